"""Check that a checkpoint is complete, by a marker with all file sizes, written last, and by each file's content.

Trainers with methods put ``continual/complete.json`` into a checkpoint once the bytes of all its files are on disk.
A checkpoint without it (of SFTTrainer, of an older version, of a process killed a moment too early) is judged by its
files: all that a resumed run reads must be readable.
"""

from __future__ import annotations

import fnmatch
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hf_continual.atomic_files import write_json

FOLDER = "continual"
MARKER = f"{FOLDER}/complete.json"
TRAINER_STATE = "trainer_state.json"
# Publishing rewrites the card.
NOT_LISTED = ("README.md",)
# Files that are not the methods': a resumed run takes tokenizer and arguments from the trainer.
READ_BY_RESUMING = (
    "trainer_state.json",
    "config.json",
    "adapter_config.json",
    "*.index.json",
    "*.safetensors",
    "*.pt",
    "*.pth",
    "*.bin",
)
PICKLED = (".pt", ".pth", ".bin")


def sync(checkpoint: Path) -> None:
    """Sync the bytes of all files under a folder to disk, then the folders' entries."""
    folders = [checkpoint, *(p for p in checkpoint.rglob("*") if p.is_dir())]
    for path in [*_files(checkpoint), *(folders if os.name == "posix" else [])]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_marker(checkpoint: Path) -> None:
    """Mark a checkpoint as complete: nothing may be written into it afterwards.

    Args:
        checkpoint: The checkpoint's folder.
    """
    sync(checkpoint)
    sizes = {p.relative_to(checkpoint).as_posix(): p.stat().st_size for p in sorted(_files(checkpoint))}
    write_json(checkpoint / MARKER, {"bytes": sizes})


def _files(checkpoint: Path) -> Iterator[Path]:
    return (p for p in checkpoint.rglob("*") if p.is_file() and p.name not in NOT_LISTED and p != checkpoint / MARKER)


def damage_of(checkpoint: Path) -> str | None:
    """Find what keeps a run from resuming from a checkpoint, naming the file.

    Args:
        checkpoint: The checkpoint's folder.

    Returns:
        What is wrong with it, or None if it is complete.
    """
    if not checkpoint.is_dir():
        return f"{checkpoint} is not a folder"
    if not (checkpoint / TRAINER_STATE).is_file():
        return f"{TRAINER_STATE} is missing: the checkpoint was not written completely"
    return _differs_from_marker(checkpoint) or _unreadable(checkpoint) or _missing(checkpoint)


def _differs_from_marker(checkpoint: Path) -> str | None:
    marker = checkpoint / MARKER
    if not marker.is_file():
        return None
    try:
        sizes = dict(json.loads(marker.read_text(encoding="utf-8"))["bytes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MARKER} is damaged ({error})"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if (now := file.stat().st_size) != size:
            return f"{name} has {now:,} bytes, but was written with {size:,}"
    return None


def _unreadable(checkpoint: Path) -> str | None:
    for file in sorted(_files(checkpoint)):
        name = file.relative_to(checkpoint).as_posix()
        read = any(fnmatch.fnmatch(file.name, pattern) for pattern in READ_BY_RESUMING)
        if not (read or name.startswith(f"{FOLDER}/")) or file.name == "training_args.bin":
            continue
        if problem := file_problem(file):
            return f"{name} {problem}"
    return None


def file_problem(file: Path) -> str | None:
    """Why a file of a checkpoint cannot be read, judged without reading tensors; None if no problem is found."""
    try:
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
        elif file.suffix in PICKLED:
            return _pickle_problem(file)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        empty = file.is_file() and file.stat().st_size == 0
        return "is empty" if empty else f"cannot be read ({error})"
    return None


def _pickle_problem(file: Path) -> str | None:
    with file.open("rb") as opened:
        first = opened.read(2)
    if not first:
        return "is empty"
    if first == b"PK":
        # An archive's directory is at its end: it is there if everything was written.
        return None if zipfile.is_zipfile(file) else "is truncated"
    return None if first[:1] == b"\x80" else "is not a file of torch"


def _missing(checkpoint: Path) -> str | None:
    names = {p.name for p in checkpoint.iterdir()}
    for index in (n for n in names if n.endswith(".index.json")):
        shards: dict[str, Any] = json.loads((checkpoint / index).read_text(encoding="utf-8")).get("weight_map", {})
        if lost := sorted(set(shards.values()) - names):
            return f"{lost[0]} is missing, but {index} lists it"
    if FOLDER not in names:
        return None  # SFTTrainer resumes without an optimizer's state, and so does a trainer without methods
    if not (checkpoint / FOLDER / "run.json").is_file():
        return f"{FOLDER}/run.json is missing"
    if "scheduler.pt" in names and not any(n.startswith(("optimizer", "rank", "global_step")) for n in names):
        return "optimizer.pt is missing"
    return None
