"""The record of a push, in the folder that was pushed: later stages find their published parent with it. Never pushed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from hf_continual.atomic_files import DamagedFile, read_json, write_json

logger = logging.getLogger(__name__)

RECORD = Path("continual") / "published.json"


def read_published(folder: Path) -> dict[str, Any]:
    """The record of a folder's last push; empty if there was none, or if the weights have changed since."""
    file = folder / RECORD
    try:
        record = read_json(file) if file.is_file() else {}
    except DamagedFile as error:
        logger.warning("%s The folder counts as not published until it is pushed again.", error)
        record = {}
    if not isinstance(record, dict):
        return {}
    return record if record.get("weights") == _weights(folder) else {}


def write_published(folder: Path, repo_id: str, revision: str, kept: str) -> None:
    """Record where a folder was pushed.

    Args:
        folder: The folder.
        repo_id: The repository.
        revision: The commit.
        kept: The author's text of the card that was pushed.
    """
    write_json(folder / RECORD, {"repo_id": repo_id, "revision": revision, "kept": kept, "weights": _weights(folder)})


def _weights(folder: Path) -> dict[str, list[int]]:
    """Size and time of every weight file: a folder that was trained further is no longer what was pushed."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        stat = file.stat()
        found[file.name] = [stat.st_size, stat.st_mtime_ns]
    return found
