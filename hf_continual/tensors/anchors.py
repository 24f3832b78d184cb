"""Anchors: the weights a method stays near. Their fingerprint, and how to read them back by name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_continual.private import loaded_from
from hf_continual.tensors.adapters import adapter_names
from hf_continual.tensors.flat import local
from hf_continual.tensors.weight_files import INDEX, WEIGHTS, weight_files

ADAPTER, PEFT_PREFIX = "adapter_model.safetensors", "base_model.model."


def distance(pairs: Iterable[tuple[Tensor, Tensor]], add_up: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Euclidean distance of weights from their anchors, the square root of sum (theta - theta*)^2, in float64.

    Args:
        pairs: Weights and anchors of equal shapes.
        add_up: Sums a tensor over the processes that hold parts of the weights; None where each holds all.

    Returns:
        Scalar.
    """
    parts = [
        (local(p.detach()).float() - local(a).to(local(p).device).float()).square().sum(dtype=torch.float64)
        for p, a in pairs
    ]
    total = torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)
    return (total if add_up is None else add_up(total)).sqrt()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names.

    Args:
        tensors: Tensors by name, on any device; one at a time is copied to the host.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def find_checkpoint(source: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint: a local one, or the cached snapshot of a Hub id.

    Args:
        source: Folder, or id of a model on the Hub.
        revision: Commit, branch or tag of a Hub id.

    Returns:
        A local folder.

    Raises:
        FileNotFoundError: If neither exists.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=["*.safetensors", "*.json"]))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"The weights to stay near are recorded as {source!r}, which is neither a local folder nor a model that the "
            f"Hub serves ({type(error).__name__}). Put it back where it was, or log in to the Hub."
        ) from error


class CheckpointTensors:
    """Tensors of a checkpoint's safetensors files by their name in the file, one read at a time.

    Args:
        folder: Folder of a full model (one file or sharded) or of a PEFT adapter.

    Raises:
        FileNotFoundError: If it contains no safetensors file.
        ValueError: If an index is damaged or names a file outside the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        full = [file for file in weight_files(folder) if file.is_file()]
        for file in full or [folder / ADAPTER]:
            if file.is_file():
                with safe_open(file, "pt") as opened:
                    self.files.update(dict.fromkeys(opened.keys(), file))
        if not self.files:
            raise FileNotFoundError(
                f"{folder} contains no safetensors checkpoint ({', '.join((WEIGHTS, ADAPTER, INDEX))}). Pickled weights are not "
                f"read; save the model again with save_pretrained."
            )

    def get(self, stored: str) -> Tensor | None:
        """The tensor with this name, or None."""
        for name in (stored, PEFT_PREFIX + stored):  # transformers' own adapters have the prefix only in the file
            if name in self.files:
                with safe_open(self.files[name], "pt") as opened:
                    return opened.get_tensor(name)
        return None


def _open_for(folder: Path, adapters: Collection[str | None]) -> dict[str | None, CheckpointTensors]:
    """The files of each adapter: in a folder with its name, as PEFT saves several, or the folder itself."""
    own = {a: folder / a if a and (folder / a / ADAPTER).is_file() else folder for a in adapters}
    shared = sorted(a for a, place in own.items() if a is not None and place == folder)
    if len(shared) > 1:
        raise ValueError(
            f"{folder} holds one adapter, and the run trains several: {', '.join(shared)}. Give a folder with a subfolder for "
            f"each, as PeftModel.save_pretrained writes it, or train one of them."
        )
    return {a: CheckpointTensors(place) for a, place in own.items()}


def read_named(
    source: str, revision: str | None, parameters: Mapping[str, Tensor], model: nn.Module
) -> dict[str, Tensor]:
    """Read the tensors of some parameters from a checkpoint.

    Args:
        source: Folder, or id of a model on the Hub.
        revision: Commit of a Hub id.
        parameters: Parameters by name; only names and shapes are used.
        model: Their model. PEFT saves adapters under other names than the model's, whatever an adapter is called.

    Returns:
        Tensors by the same names, on the host, in the dtype of the file.

    Raises:
        FileNotFoundError: If the checkpoint is gone.
        ValueError: If a parameter is missing or has another shape; names the first ones.
    """
    stored = {name: (None, name) for name in parameters} | {
        name: place for name, place in adapter_names(model).items() if name in parameters
    }
    files = _open_for(find_checkpoint(source, revision), {adapter for adapter, _ in stored.values()})
    found = {name: files[adapter].get(key) for name, (adapter, key) in stored.items()}
    wrong = [n for n, t in found.items() if t is None or t.shape != parameters[n].shape]
    if wrong:
        raise ValueError(
            f"{source!r} does not contain the weights to stay near: {len(wrong)} of {len(parameters)} parameters are missing "
            f"or have another shape, such as {', '.join(wrong[:3])}. Give the checkpoint that training started from."
        )
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def like(tensor: Tensor, p: Tensor) -> Tensor:
    """A tensor from a file on the device, in the dtype and with the sharding of its parameter."""
    tensor = tensor.to(device=p.device, dtype=p.dtype)
    return distribute_tensor(tensor, p.device_mesh, p.placements) if isinstance(p, DTensor) else tensor.contiguous()


def read_again(
    record: Mapping[str, Any],
    places: Sequence[tuple[str, str | None]],
    parameters: Mapping[str, Tensor],
    model: nn.Module,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read recorded anchors from wherever the same weights are now; the fingerprint proves that they are the same.

    Args:
        record: What `recorded_base` returned, with the anchors' ``"fingerprint"``.
        places: Folders or ids with their revision to try if the recorded one fails; empty names are skipped.
        parameters: The anchored parameters by name.
        model: Their model.

    Returns:
        Anchors by name, and the record with the place where they were found.

    Raises:
        FileNotFoundError: If there is no checkpoint at the only place.
        ValueError: If no place holds these weights; gives the reason for each.
    """
    errors: list[Exception] = []
    for source, revision in dict.fromkeys([(record["base"], record["revision"]), *places]):
        if not source or (errors and _same(source, record["base"])):
            continue
        try:
            found = {n: like(t, parameters[n]) for n, t in read_named(source, revision, parameters, model).items()}
            if (digest := fingerprint(found)) != record["fingerprint"]:
                raise ValueError(
                    f"RecAdam's anchors were read again from {source!r} and are not the ones that training started from: "
                    f"fingerprint {digest[:16]} instead of {record['fingerprint'][:16]}. The base checkpoint was changed; "
                    f"restore it, or start a new run."
                )
            return found, {**record, "base": _absolute(source), "revision": revision}
        except (FileNotFoundError, ValueError) as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    raise ValueError(
        f"RecAdam's anchors are not in the checkpoint, and none of the places they could be read from has them: "
        f"{' '.join(f'({i}) {error}' for i, error in enumerate(errors, 1))} Give the trainer the model that the run started "
        f"from, wherever it is now."
    )


def _absolute(source: str) -> str:
    local = Path(source).expanduser()
    return str(local.resolve()) if local.is_dir() else source


def _same(source: str, other: str) -> bool:
    return _absolute(source) == _absolute(other)


def base_of(model: nn.Module) -> tuple[str, str | None]:
    """The source that a model records: folder or id, empty if none, and the commit of an id."""
    return loaded_from(model.config)


def is_lasting(source: str, output_dir: Path | None) -> bool:
    """Whether a base can be expected to stay: not a trainer's checkpoint, which rotates away, nor the run's output.

    Args:
        source: Folder or Hub id.
        output_dir: Output folder of the run.

    Returns:
        True for Hub ids and for folders elsewhere.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return True
    places = (folder.resolve(), *folder.resolve().parents)
    rotates = any(re.fullmatch(r"checkpoint-\d+", place.name) for place in places)
    return not rotates and (output_dir is None or output_dir.expanduser().resolve() not in places)


def state_of(source: str) -> dict[str, tuple[int, int]]:
    """Size and time of each weight file of a folder, to detect that it was overwritten; empty for a Hub id."""
    folder = Path(source).expanduser()
    stats = {file.name: file.stat() for file in sorted(folder.glob("*.safetensors"))} if folder.is_dir() else {}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def recorded_base(
    model: nn.Module, anchors: Mapping[str, Tensor], output_dir: Path | None = None
) -> dict[str, str | None] | None:
    """Find where anchors can be read again instead of being stored; proved by reading them now.

    Args:
        model: The model; its configuration records what it was loaded from.
        anchors: Anchors by parameter name, not sharded.
        output_dir: Output folder of the run.

    Returns:
        ``{"base": folder or id, "revision": commit or None}``, or None when the checkpoint is not there, is not
        expected to stay (`is_lasting`), or one tensor differs (a model made in memory, an adapter, quantised weights).
    """
    source, revision = base_of(model)
    if not source or not is_lasting(source, output_dir):
        return None
    try:
        files = CheckpointTensors(find_checkpoint(source, revision))
    except (FileNotFoundError, ValueError):
        return None
    for name, anchor in anchors.items():
        tensor = files.get(name)
        if tensor is None or tensor.shape != anchor.shape:
            return None
        if not torch.equal(tensor.to(device=anchor.device, dtype=anchor.dtype), anchor):
            return None
    return {"base": _absolute(source), "revision": revision}
