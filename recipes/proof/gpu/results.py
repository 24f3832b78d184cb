"""A result file on the GPU machine: the machine's facts and one entry after the other, on disk as soon as each is known."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hf_continual.atomic_files import read_json, write_json

NAMED = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "bitsandbytes",
    "triton",
    "numpy",
)


def out() -> Path:
    """The folder of the results."""
    return Path(os.environ.get("OUT", "out")).resolve()


def tiny() -> bool:
    """Whether sizes are those of the dry run."""
    return os.environ.get("GPU_SIZE") == "tiny"


def seconds_left(begun: float) -> float:
    """Seconds that are left of this part, which began at a time of `time.monotonic`."""
    return float(os.environ.get("GPU_SECONDS", "1e9")) - (time.monotonic() - begun)


def device() -> str:
    """``cuda`` or ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    """Wait until the card has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def about() -> dict[str, Any]:
    """The card, versions and commit that a result belongs to."""
    versions = {}
    for name in NAMED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    card = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "card": None if card is None else card.name,
        "card_memory_bytes": None if card is None else card.total_memory,
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": os.environ.get("GPU_COMMIT"),
        "size": os.environ.get("GPU_SIZE", "full"),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


class Results:
    """A result file that is written again with every entry.

    Args:
        name: The file's name without ``.json``; a former file is continued.
    """

    def __init__(self, name: str) -> None:
        self.file = out() / f"{name}.json"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.content: dict[str, Any] = read_json(self.file) if self.file.is_file() else {"format": 1, "found": {}}
        self.content["about"] = about()
        self._write()

    def add(self, key: str, value: Any) -> None:
        """Keep an entry."""
        self.content["found"][key] = value
        self._write()

    def _write(self) -> None:
        write_json(self.file, self.content)
