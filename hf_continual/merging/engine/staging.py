"""Where an output is built until it is complete: a hidden folder next to it, a journal, one rename at the end.

``PARENT/.NAME.merging/`` holds ``out/`` (the output), ``journal.json`` (which files are finished, and of which merge) and
``lock``. A killed process leaves it there; the same merge resumes in it, another one starts over. Readers see
the old output or the new one, never a part.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_continual.atomic_files import read_json, write_json
from hf_continual.disk import writing
from hf_continual.merging.errors import MergeError

logger = logging.getLogger(__name__)

FOUND = "found.json"  # results of passes over values, before anything is written
CACHE = "calibration"  # files of a method, such as representations


def check_free(output_dir: Path, overwrite: bool) -> None:
    """Refuse a non-empty output folder, unless it may be replaced.

    Args:
        output_dir: The output's final place.
        overwrite: Whether an old output may be replaced.

    Raises:
        FileExistsError: If it is a file, or holds files and `overwrite` is False.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise FileExistsError(f"{output_dir} is a file; the output is a folder. Choose another output_dir.")
    if output_dir.is_dir() and not overwrite and any(output_dir.iterdir()):
        raise FileExistsError(
            f"{output_dir} is not empty. Choose another output_dir, or replace it with overwrite=True; the old one stays "
            f"until the new one is complete."
        )


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Staging:
    """A locked hidden folder in which one merge writes.

    Args:
        output_dir: The output's final place.
        plan: Hash of everything that decides the output's bytes.
        resume: Whether to keep the files that an interrupted merge of the same plan finished.
        notes: Facts noted while files are written, kept with them; those of an interrupted merge are added to it.
    """

    def __init__(self, output_dir: Path, plan: str, resume: bool = True, notes: dict[str, Any] | None = None) -> None:
        self.output_dir = output_dir
        self.folder = staging_folder(output_dir)
        self.out = self.folder / "out"
        self._journal = self.folder / "journal.json"
        found = read_json(self._journal) if resume and self._journal.is_file() else {}
        if self.out.exists() and found.get("plan") != plan:
            logger.info("%s: an interrupted merge of other inputs or options is discarded", output_dir)
            shutil.rmtree(self.out)
        self.finished: dict[str, Any] = found.get("finished", {}) if found.get("plan") == plan else {}
        self.finished = {
            n: facts
            for n, facts in self.finished.items()
            if (self.out / n).is_file() and (self.out / n).stat().st_size == facts["size"]
        }
        if self.finished:
            logger.info("%s: resuming, %d files of an interrupted merge are finished", output_dir, len(self.finished))
        self._plan, self._notes = plan, {} if notes is None else notes
        if self.finished:
            self._notes.update(found.get("notes", {}))
        self.out.mkdir(parents=True, exist_ok=True)
        self._write()

    def record(self, name: str, facts: dict[str, Any]) -> None:
        """Record that a file, whose bytes are on the disk, is finished."""
        self.finished[name] = facts
        self._write()

    def _write(self) -> None:
        write_json(self._journal, {"plan": self._plan, "finished": self.finished, "notes": self._notes})

    def publish(self) -> None:
        """Move the complete output into place: the old one aside, one rename, the old one deleted last."""
        sync_folder(self.out)
        if self.output_dir.is_dir():
            self.output_dir.rename(self.folder / "old")
        self.out.rename(self.output_dir)
        sync_folder(self.output_dir.parent)
        shutil.rmtree(self.folder)


def staging_folder(output_dir: Path) -> Path:
    """The hidden folder in which an output is built."""
    return output_dir.parent / f".{output_dir.name}.merging"


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Lock this output for one process; restore an old output that a crash left aside.

    Args:
        output_dir: The output's final place.

    Yields:
        Nothing; the lock is held meanwhile. The system releases it when a process dies.

    Raises:
        MergeError: If another process writes it.
        CannotWrite: If there is no space or no permission to write there.
    """
    way_out = (
        f"{output_dir} is unchanged. Free some space there, or choose another output_dir; after that the same call resumes where "
        f"it was interrupted."
    )
    with writing(output_dir, way_out), _alone(output_dir):
        yield


@contextmanager
def _alone(output_dir: Path) -> Iterator[None]:
    folder = staging_folder(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise MergeError(
            f"Another process is writing {output_dir} (it holds {folder / 'lock'}). Wait for it, or choose another "
            f"output_dir."
        ) from None
    try:
        if (folder / "old").is_dir() and not output_dir.exists():
            (folder / "old").rename(output_dir)
        yield
    finally:
        lock.release()
        # A refused merge leaves nothing; an interrupted one leaves its journal and can resume later.
        if folder.is_dir() and not any((folder / n).exists() for n in ("journal.json", CACHE, "old", FOUND)):
            shutil.rmtree(folder, ignore_errors=True)
