"""Telling a path from a name on the Hub, and checking a place before anything is written there."""

from __future__ import annotations

import os
from pathlib import Path

ROW_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".txt")


def is_path(text: str, suffixes: tuple[str, ...] = ()) -> bool:
    """Whether a text can only be a path: a Hub id is ``name`` or ``namespace/name``.

    Args:
        text: What a user named.
        suffixes: Endings of files, which no Hub id has.

    Returns:
        Whether it must be looked for on the disk.
    """
    path = Path(text)
    return path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or path.suffix in suffixes


def check_is_there(source: str | os.PathLike[str], what: str) -> None:
    """Refuse a path where nothing is, before it is taken for a name on the Hub.

    Args:
        source: Folder or Hub id.
        what: What is loaded from it.

    Raises:
        FileNotFoundError: If it can only be a path, and is not a folder.
    """
    text = os.fspath(source)
    path = Path(text).expanduser()
    if (is_path(text) or path.is_file()) and not path.is_dir():
        state = "is a file and not a folder" if path.exists() else f"does not exist (looked in {Path.cwd()})"
        raise FileNotFoundError(
            f"{what}: the folder {text} {state}. If it was moved, name its new place; a Hub id is 'namespace/name'."
        )


def check_rows_there(source: str, what: str) -> None:
    """Refuse the path of rows where nothing is, before anything heavy is imported.

    Args:
        source: A file, a folder or a Hub id.
        what: What it is, or the option that named it.

    Raises:
        FileNotFoundError: If it can only be a path, and nothing is there.
    """
    if is_path(source, ROW_SUFFIXES) and not Path(source).expanduser().exists():
        raise FileNotFoundError(
            f"{what}: {source!r} does not exist (looked in {Path.cwd()}). Name an existing file or folder, or a dataset on the Hub "
            f"as 'owner/name'."
        )


def cannot_hold(folder: Path) -> str | None:
    """Why a folder cannot be written.

    Args:
        folder: An output folder, which may not exist yet.

    Returns:
        The reason as a clause; None if it can be written.
    """
    place = folder.expanduser().absolute()
    if place.exists() and not place.is_dir():
        return f"{folder} is a file, and the output is a folder"
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
    """Whether the file system takes no files at all, which `os.access` does not tell the superuser."""
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY) or folder.parts[:2] == ("/", "proc")
