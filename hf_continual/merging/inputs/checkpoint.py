"""Finished checkpoints, opened without loading them: full models (one file or shards) and PEFT adapters."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_continual.atomic_files import read_object
from hf_continual.inference.names import NAMES
from hf_continual.merging.errors import MergeError, as_merge_error
from hf_continual.merging.inputs.safetensors_file import Files, StoredFile, StoredTensor, read_header
from hf_continual.tensors.weight_files import INDEX, WEIGHTS, unused_index, weight_files, weight_map

CONFIG, ADAPTER_CONFIG, ADAPTER_WEIGHTS = "config.json", "adapter_config.json", "adapter_model.safetensors"
_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_WANTED = [
    "*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.codes", "*.py", "README.md",
]  # fmt: skip
# Other formats of the same weights, next to them; the only folder is that of further chat templates.
_UNWANTED = [*(f"*/{pattern}" for pattern in _WANTED if pattern != "*.jinja"), "consolidated*"]


@dataclass(frozen=True)
class Checkpoint:
    """A full model or an adapter in a folder; only headers and configurations are in memory.

    Args:
        name: Its name in messages and reports: the Hub id or the last part of its path.
        folder: Where its files are.
        config: ``config.json`` of a model, ``adapter_config.json`` of an adapter.
        tensors: Its tensors by name.
        hub_id: Its Hub id, or None for a folder.
        revision: The commit its files are from, or None for a folder.
        files: Its weight files.
        notes: Notes on it for the merge's reader.
        seen_as: How its weights are changed while they are read, or None.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    is_adapter: bool = False
    hub_id: str | None = None
    revision: str | None = None
    files: tuple[StoredFile, ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()
    seen_as: Mapping[str, Any] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the checkpoint: sha256 over headers, sizes and the first 4 KiB of every tensor."""
        digest = hashlib.sha256()
        for file in sorted(self.files, key=lambda f: f.path.name):
            digest.update(f"{file.path.name} {file.size} {file.header_sha256}\n".encode())
        with Files() as files:
            for name in sorted(self.tensors):
                tensor = replace(self.tensors[name], lens=None)
                start = bytearray(min(tensor.nbytes, 4096 // tensor.itemsize * tensor.itemsize))
                files.read_into(tensor, 0, len(start) // tensor.itemsize, memoryview(start))
                digest.update(start)
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())


def fetch(model: str | os.PathLike[str]) -> tuple[Path, str | None, str | None]:
    """Find the folder of a model; download it if it is a Hub id.

    Args:
        model: A folder, or a Hub id such as ``"me/model"`` or ``"me/model@revision"``.

    Returns:
        The folder, the Hub id and the commit (both None for a folder).

    Raises:
        FileNotFoundError: If it is neither a folder nor a valid Hub id.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder, None, None
    hub_id, _, revision = str(model).partition("@")
    if not _ID.match(hub_id) or hub_id.startswith("."):
        raise FileNotFoundError(
            f"{str(model)!r} is neither a folder nor a valid Hub id such as 'me/model' or 'me/model@revision'."
        )
    from huggingface_hub import snapshot_download  # imported only here: a merge of folders needs no network code

    found = Path(
        snapshot_download(hub_id, revision=revision or None, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
    )
    return found, hub_id, found.name


def open_checkpoint(model: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers and the configuration of a model or an adapter.

    Args:
        model: A folder, or a Hub id such as ``"me/model"`` or ``"me/model@revision"`` (downloaded into the cache).

    Returns:
        The checkpoint; no weights are read.

    Raises:
        FileNotFoundError: If it is neither a folder nor a valid Hub id, or holds no model.
        MergeError: If its weights are pickled, in GGUF, quantised, cut off or incomplete.
    """
    folder, hub_id, revision = fetch(model)
    name = hub_id or folder.resolve().name
    adapter = (folder / ADAPTER_CONFIG).is_file()
    config_file = folder / (ADAPTER_CONFIG if adapter else CONFIG)
    if not config_file.is_file():
        raise FileNotFoundError(
            f"{folder} holds neither {CONFIG} nor {ADAPTER_CONFIG}: it is neither a model nor an adapter.{_inside(folder, hub_id)}"
        )
    with as_merge_error():
        config = read_object(config_file)
        paths = [folder / ADAPTER_WEIGHTS] if adapter else weight_files(folder)
    if (kind := config.get("peft_type")) in NAMES:
        raise MergeError(
            f"{name} is {NAMES[kind].title} ({kind}), whose modules choose for each row: it cannot be merged, and nothing can be "
            f"merged on top of it. Merge full models or LoRA adapters; this one loads with hf_continual.{NAMES[kind].loader}."
        )
    if missing := [p.name for p in paths if not p.is_file()]:
        _explain_missing(folder, missing)
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        header = read_header(path)
        if twice := sorted(tensors.keys() & header.keys()):
            raise MergeError(f"{folder} stores {twice[0]!r} in two files. Save the model again.")
        tensors |= header
    notes = []
    if adapter and (others := [p for p in _models_in(folder) if (p / ADAPTER_CONFIG).is_file() and not _is_step(p)]):
        notes.append(
            f"{name} also holds adapters in {', '.join(p.name for p in others)}, which were not read; give {others[0]} to merge that one."
        )
    if not adapter:
        _check_not_quantised(name, config)
        if elsewhere := config.get("transformers_weights"):
            raise MergeError(
                f"{config_file} says transformers_weights={elsewhere!r}, but only {WEIGHTS} and {INDEX} are read here. Load "
                f"the model once (from_pretrained) and save it with save_pretrained."
            )
        notes = _compare_index(name, folder, paths, tensors)
    files = {t.file.path: t.file for t in tensors.values()}
    return Checkpoint(name, folder, config, tensors, adapter, hub_id, revision, tuple(files.values()), tuple(notes))


def _models_in(folder: Path) -> list[Path]:
    """The folders below that hold a model or an adapter, such as an adapter that PEFT saved under its own name."""
    below = [file.parent for name in (CONFIG, ADAPTER_CONFIG) for file in folder.glob(f"*/{name}")]
    return sorted(set(below), key=lambda p: (len(p.name), p.name))


def _is_step(folder: Path) -> bool:
    return folder.name.startswith("checkpoint-")


def _inside(folder: Path, hub_id: str | None) -> str:
    """Where a model may be, if it is not in the folder itself."""
    if found := _models_in(folder):
        kind = "an adapter" if (found[-1] / ADAPTER_CONFIG).is_file() else "a model"
        listed = ", ".join(str(p) for p in found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        return f" There is {kind} below it ({listed}): give {found[-1]}."
    if hub_id is not None:
        return (
            f" If it is in a subfolder of the repository, like an adapter saved under its own name: "
            f"hf download {hub_id} --local-dir DIR, and give DIR/FOLDER."
        )
    return ""


def _compare_index(name: str, folder: Path, paths: Sequence[Path], tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Notes on an index that was not used; an index that was used must name only tensors that exist."""
    if unused := unused_index(folder):
        return [
            f"{name} has both {paths[0].name} and {unused.name}. As from_pretrained does, {paths[0].name} was read, and the "
            f"index and its files were not; remove the old files."
        ]
    if (folder / INDEX).is_file():
        with as_merge_error():
            listed = weight_map(folder / INDEX)
        if lost := sorted(listed.keys() - tensors.keys()):
            raise MergeError(
                f"{folder / INDEX} says that {lost[0]!r} is in {listed[lost[0]]}, but no file of the model holds it "
                f"({len(lost)} such tensors). Download or save the model again."
            )
    return []


def _explain_missing(folder: Path, missing: list[str]) -> None:
    for pattern, kind in (("*.bin", "pickled (.bin)"), ("*.pt", "pickled (.pt)"), ("*.gguf", "GGUF")):
        if other := sorted(p.name for p in folder.glob(pattern) if p.name != "training_args.bin"):
            how = "gguf_file=..." if kind == "GGUF" else "use_safetensors=False"
            raise MergeError(
                f"{folder} holds {kind} weights ({other[0]}); only safetensors can be read one range at a time and "
                f"without running code. Load the model once (from_pretrained(..., {how})) and save it with save_pretrained."
            )
    raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}. Download or save the model again.")


def _check_not_quantised(name: str, config: Mapping[str, Any]) -> None:
    if quantised := config.get("quantization_config"):
        raise MergeError(
            f"{name} is quantised ({quantised.get('quant_method', 'unknown method')}); averaging quantised weights is "
            f"meaningless. Give the 16-bit model; an adapter trained on a quantised base is merged onto the 16-bit base (or, with "
            f"quantized_base='dequantize', onto the values that the adapter saw)."
        )
