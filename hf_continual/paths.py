"""Distinguish paths from Hub ids, and check a folder before anything is written to it."""

from __future__ import annotations

import os
from pathlib import Path

ROW_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".txt")


def is_path(text: str, suffixes: tuple[str, ...] = ()) -> bool:
    """Whether a text can only be a path: a Hub id is ``name`` or ``namespace/name``.

    Args:
        text: The text a user gave.
        suffixes: File suffixes, which a Hub id never has.

    Returns:
        Whether it must be a path on disk.
    """
    path = Path(text)
    return path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or path.suffix in suffixes


def check_is_there(source: str | os.PathLike[str], what: str) -> None:
    """Refuse a path that does not exist, before it is taken for a Hub id.

    Args:
        source: Folder or Hub id.
        what: Name of what is loaded from it, for the message.

    Raises:
        FileNotFoundError: If it can only be a path, and is not a folder.
    """
    text = os.fspath(source)
    path = Path(text).expanduser()
    if (is_path(text) or path.is_file()) and not path.is_dir():
        state = "is a file and not a folder" if path.exists() else f"does not exist (looked in {Path.cwd()})"
        raise FileNotFoundError(
            f"{what}: the folder {text} {state}. If it was moved, give its new path; a Hub id is 'namespace/name'."
        )


def check_rows_there(source: str, what: str) -> None:
    """Refuse a path of rows that does not exist, before anything heavy is imported.

    Args:
        source: A file, a folder or a Hub id.
        what: What it is, or the option that gave it.

    Raises:
        FileNotFoundError: If it can only be a path, and does not exist.
    """
    if is_path(source, ROW_SUFFIXES) and not Path(source).expanduser().exists():
        raise FileNotFoundError(
            f"{what}: {source!r} does not exist (looked in {Path.cwd()}). Name an existing file or folder, or a dataset on the Hub "
            f"as 'owner/name'."
        )


def cannot_hold(folder: Path) -> str | None:
    """Find out why a folder cannot be written.

    Args:
        folder: An output folder, which may not exist yet.

    Returns:
        The reason as a clause; None if it can be written.
    """
    place = folder.expanduser().absolute()
    if place.exists() and not place.is_dir():
        return f"{folder} is a file, and the output must be a folder"
    above = place
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        return f"{above} is a file, so {folder} cannot be created"
    if not os.access(above, os.W_OK | os.X_OK) or _is_read_only(above):
        return (
            f"{above} cannot be written by this user, so {folder} cannot be {'used' if above == place else 'created'}"
        )
    return None


def _is_read_only(folder: Path) -> bool:
    """Whether the file system is read-only, which `os.access` does not report to the superuser."""
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY) or folder.parts[:2] == ("/", "proc")
