"""Anchors: the weights a method stays near - their fingerprint, and reading them back by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor, nn

INDEXES = ("model.safetensors.index.json",)
SINGLES = ("model.safetensors", "adapter_model.safetensors")


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names.

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
        FileNotFoundError: If there is neither.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=["*.safetensors", "*.json"]))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"The weights to stay near are recorded as {source!r}, which is neither a folder here nor a model that the "
            f"Hub gives out ({type(error).__name__}). Put it back where it was, or log in to the Hub."
        ) from error


class CheckpointTensors:
    """Tensors of a checkpoint's safetensors files by parameter name, one read at a time.

    Args:
        folder: Folder of a full model (one file or sharded) or of a PEFT adapter.

    Raises:
        FileNotFoundError: If it holds no safetensors file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        for index in INDEXES:
            if (folder / index).is_file():
                listed = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
                self.files.update({name: folder / file for name, file in listed.items()})
        for single in SINGLES:
            if not self.files and (folder / single).is_file():
                with safe_open(folder / single, "pt") as opened:
                    self.files.update(dict.fromkeys(opened.keys(), folder / single))
        if not self.files:
            raise FileNotFoundError(
                f"{folder} holds no safetensors checkpoint ({', '.join((*SINGLES, *INDEXES))}). Pickled weights are not "
                f"read; save the model again with save_pretrained."
            )

    def get(self, parameter: str) -> Tensor | None:
        """The tensor of a parameter, or None; an adapter's name ("default") is no part of the file's names."""
        for name in (parameter, parameter.replace(".default.", "."), parameter.removesuffix(".default")):
            if name in self.files:
                with safe_open(self.files[name], "pt") as opened:
                    return opened.get_tensor(name)
        return None


def read_named(source: str, revision: str | None, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the tensors of some parameters from a checkpoint.

    Args:
        source: Folder, or id of a model on the Hub.
        revision: Commit of a Hub id.
        parameters: Parameters by name; only names and shapes are used.

    Returns:
        Tensors by the same names, on the host, in the type of the file.

    Raises:
        FileNotFoundError: If the checkpoint is gone.
        ValueError: If a parameter is missing in it or has another shape; names the first ones.
    """
    files = CheckpointTensors(find_checkpoint(source, revision))
    found = {name: files.get(name) for name in parameters}
    wrong = [n for n, t in found.items() if t is None or t.shape != parameters[n].shape]
    if wrong:
        raise ValueError(
            f"{source!r} does not hold the weights to stay near: {len(wrong)} of {len(parameters)} parameters are missing "
            f"or have another shape, such as {', '.join(wrong[:3])}. Name the checkpoint that training started from."
        )
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def recorded_base(model: nn.Module, anchors: Mapping[str, Tensor]) -> dict[str, str | None] | None:
    """Where anchors can be read again instead of being stored: proved by reading them now.

    Args:
        model: The model, whose configuration says what it was loaded from.
        anchors: Anchors by parameter name, not sharded.

    Returns:
        ``{"base": folder or id, "revision": commit or None}``, or None when the checkpoint is not there or
        one tensor differs (a model made in memory, an adapter drawn at random, quantised weights).
    """
    config = model.config
    source, revision = config._name_or_path, getattr(config, "_commit_hash", None)  # pyrefly: ignore
    if not source:
        return None
    try:
        files = CheckpointTensors(find_checkpoint(source, revision))
    except FileNotFoundError:
        return None
    for name, anchor in anchors.items():
        tensor = files.get(name)
        if tensor is None or tensor.shape != anchor.shape:
            return None
        if not torch.equal(tensor.to(device=anchor.device, dtype=anchor.dtype), anchor):
            return None
    local = Path(source).expanduser()
    return {"base": str(local.resolve()) if local.is_dir() else source, "revision": revision}
