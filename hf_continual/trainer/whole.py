"""Whether a checkpoint is whole: a marker written last that lists the size of every file, and what each file holds.

Trainers with methods put ``continual/complete.json`` into a checkpoint once the bytes of all its files are on the disk.
A checkpoint without it (of SFTTrainer, of an older version, of a process killed a moment too early) is judged by what
is there: what a resumed run reads must be readable.
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
# A card is written again by whoever publishes.
NOT_LISTED = ("README.md",)
# Of files that are not the methods': a resumed run takes tokenizer and arguments from the trainer.
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
    """Put the bytes of all files below a folder on the disk, then the folders' entries."""
    folders = [checkpoint, *(p for p in checkpoint.rglob("*") if p.is_dir())]
    for path in [*_files(checkpoint), *(folders if os.name == "posix" else [])]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_marker(checkpoint: Path) -> None:
    """Say that a checkpoint was written to its end: nothing may be written into it afterwards.

    Args:
        checkpoint: The checkpoint's folder.
    """
    sync(checkpoint)
    sizes = {p.relative_to(checkpoint).as_posix(): p.stat().st_size for p in sorted(_files(checkpoint))}
    write_json(checkpoint / MARKER, {"bytes": sizes})


def _files(checkpoint: Path) -> Iterator[Path]:
    return (p for p in checkpoint.rglob("*") if p.is_file() and p.name not in NOT_LISTED and p != checkpoint / MARKER)


def damage_of(checkpoint: Path) -> str | None:
    """What keeps a run from resuming from a checkpoint, naming the file.

    Args:
        checkpoint: The checkpoint's folder.

    Returns:
        What is wrong with it, or None if it is whole.
    """
    if not checkpoint.is_dir():
        return f"{checkpoint} is not a folder"
    if not (checkpoint / TRAINER_STATE).is_file():
        return f"{TRAINER_STATE} is missing: the checkpoint was not written to its end"
    return _differs_from_marker(checkpoint) or _unreadable(checkpoint) or _missing(checkpoint)


def _differs_from_marker(checkpoint: Path) -> str | None:
    marker = checkpoint / MARKER
    if not marker.is_file():
        return None
    try:
        sizes = dict(json.loads(marker.read_text(encoding="utf-8"))["bytes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MARKER} is not what was written ({error})"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if (now := file.stat().st_size) != size:
            return f"{name} has {now:,} bytes and was written with {size:,}"
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
    """Why a file of a checkpoint cannot be read, judged without reading tensors; None where nothing is known against it."""
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
        # The directory of an archive is its end: it is there if all of it was written.
        return None if zipfile.is_zipfile(file) else "is cut off"
    return None if first[:1] == b"\x80" else "is not a file of torch"


def _missing(checkpoint: Path) -> str | None:
    names = {p.name for p in checkpoint.iterdir()}
    for index in (n for n in names if n.endswith(".index.json")):
        shards: dict[str, Any] = json.loads((checkpoint / index).read_text(encoding="utf-8")).get("weight_map", {})
        if lost := sorted(set(shards.values()) - names):
            return f"{lost[0]} is missing, and {index} names it"
    if FOLDER not in names:
        return None  # SFTTrainer resumes without an optimizer's state, and so does a trainer without methods
    if not (checkpoint / FOLDER / "run.json").is_file():
        return f"{FOLDER}/run.json is missing"
    if "scheduler.pt" in names and not any(n.startswith(("optimizer", "rank", "global_step")) for n in names):
        return "optimizer.pt is missing"
    return None
