"""State that the methods of a finished task left: the list, and the facts about its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

FOLDER, MANIFEST = "continual", "methods.json"
STAGED = ".staged"
FORMAT = 1
# How a run starts without what earlier tasks left, on ContinualTrainer and on any other trainer.
FRESH = "ContinualConfig(fresh_methods=True) or ContinualCallback(..., fresh_methods=True)"
AGAIN = f"Save the model again (rerun what saved it), or start without what was learned: {FRESH}."


class HandOverError(ValueError):
    """Raised when what a method left cannot be loaded."""


@dataclass(frozen=True)
class Kept:
    """State that one method left.

    Args:
        name: Name of the instance, and of its files.
        kind: Its name in the table of methods, or ``"package.module:Class"``.
        options: Its hyper-parameters.
        files: Checksum and bytes by file name.
        tensors: Number of tensors.
        what: A description.
        rows: Whether it holds rows of data, which are not published by default: its files may then be missing.
    """

    name: str
    kind: str
    options: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    tensors: int
    what: str = ""
    rows: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of its files."""
        return sum(int(facts["bytes"]) for facts in self.files.values())


@dataclass(frozen=True)
class HandOver:
    """State that all methods of a finished task left.

    Args:
        folder: The model's folder.
        task: Name and index of the task.
        methods: What each left.
        weights: Checksum and bytes of the weight files it was saved with, by name.
        base: Facts about the weights below an adapter.
        held: What each method left, if that is in this process and not in files.
    """

    folder: Path
    task: Mapping[str, Any]
    methods: tuple[Kept, ...]
    weights: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)
    held: Mapping[str, Mapping[str, Any]] | None = None

    @property
    def names(self) -> list[str]:
        """Names of the methods that left something."""
        return [kept.name for kept in self.methods]


def weight_files(folder: Path) -> list[Path]:
    """Weight files of a model's folder."""
    return sorted(file for file in folder.glob("*.safetensors") if file.is_file())


def file_facts(file: Path) -> dict[str, Any]:
    """Bytes and checksum of a file."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as opened:
        while block := opened.read(1 << 22):
            digest.update(block)
    return {"bytes": file.stat().st_size, "xxh3_128": digest.hexdigest()}
