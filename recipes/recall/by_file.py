"""Merges that the package writes, read back as changes: rules that are not a weighted average, and the check of those that are."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experts import Change, Workbench
from safetensors.torch import load_file, save_file

from hf_continual import merge

FILE = "model.safetensors"


def written(bench: Workbench, rule: str, adapters: Sequence[Path], base: Path, room: Path, **options: Any) -> Change:
    """Merge adapters by a rule of the package, and return the result as a change of the bench's base.

    Args:
        bench: Has the base's weights.
        rule: Name of a method, see `hf_continual.merge`.
        adapters: Their folders, the newest last.
        base: The model they were trained on.
        room: Emptied, used and emptied again.
        **options: Options of the method.
    """
    shutil.rmtree(room, ignore_errors=True)
    merge(rule, adapters, room, base=base, output="model", dtype="float32", progress=False, **options)
    found = read_change(bench, room)
    shutil.rmtree(room)
    return found


def read_change(bench: Workbench, folder: Path) -> Change:
    """How the weights of a full model in float32 differ from the base's."""
    stored = load_file(folder / FILE)
    return {name: stored[name] - weight for name, weight in bench.base.items()}


def save_full(bench: Workbench, change: Change, model: Path, folder: Path) -> Path:
    """The base with a change, as a full model in float32."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns(FILE))
    stored = {name: tensor.float() for name, tensor in load_file(model / FILE).items()}
    stored |= {name: (weight + change[name]).contiguous() for name, weight in bench.base.items()}
    save_file(stored, folder / FILE, metadata={"format": "pt"})
    return folder
