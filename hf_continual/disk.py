"""Errors for files that cannot be written: which file, how much space is free, what is safe, and what to do.

Full disks, quotas, read-only file systems and missing permissions reach a program as errors of many libraries, most of
them without a path. `writing` is the one place that turns them into a clear message.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "this user has no permission to write there",
    errno.EPERM: "this user has no permission to write there",
}
FULL = (errno.ENOSPC, errno.EDQUOT)
# safetensors' Rust code gives the system's error number; torch's and numpy's writers notice only that bytes are
# missing.
_NUMBER = re.compile(r"os error (\d+)|Errno (\d+)")
_CUT = re.compile(
    r"unexpected pos \d+ vs \d+|PytorchStreamWriter failed|file write failed|\d+ requested and \d+ written|No space left|Disk quota exceeded"
)


class CannotWrite(OSError):
    """Raised if a file or folder cannot be written; the message says what is safe and what to do.

    Attributes:
        path: The file or folder, or None if the message says everything.
    """

    path: Path | None = None


@contextmanager
def writing(folder: Path, way_out: str | Callable[[], str]) -> Iterator[None]:
    """Explain disk errors raised while a folder is written; others pass through. If nested, the outermost explains.

    Args:
        folder: The folder being written.
        way_out: What is safe and what to do, in sentences; computed when needed.

    Yields:
        None: While it is written.

    Raises:
        CannotWrite: Instead of a library's error.
    """
    try:
        yield
    except Exception as error:
        if (found := _cause(error, folder)) is None:
            raise
        number, path = found
        raise cannot_write(path, number, way_out() if callable(way_out) else way_out) from error


def cannot_write(path: Path, number: int, way_out: str) -> CannotWrite:
    """The error for a path and a number of `errno`; `way_out` says what is safe and what to do."""
    room = f" ({size(free_space(path))} are free there)" if number in FULL else ""
    made = CannotWrite(
        number, f"{path} could not be written: {REASONS.get(number, os.strerror(number))}{room}. {way_out}"
    )
    made.path = path
    return made


def free_space(path: Path) -> int:
    """Free bytes on the disk of a path, which may not exist yet."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size(number: float) -> str:
    """A number of bytes in a readable unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit in ("B", "kB") or number >= 10 else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def _cause(error: BaseException, folder: Path) -> tuple[int, Path] | None:
    """Number and path of the disk error that caused an exception, or None if the cause is something else."""
    seen: list[BaseException] = []
    now: BaseException | None = error
    while now is not None and now not in seen:
        seen.append(now)
        if isinstance(now, CannotWrite):
            return None if now.path is None or now.errno is None else (now.errno, now.path)
        if (number := _number(now)) in REASONS:
            name = getattr(now, "filename", None)
            path = folder if name is None or isinstance(name, int) else Path(os.fsdecode(name))
            # A file without read permission can be anywhere; one without write permission is in the folder being
            # written.
            if number in FULL or _below(path, folder):
                return number, path
        now = now.__cause__ or now.__context__
    return None


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    if found := _NUMBER.search(text):
        return int(found.group(1) or found.group(2))
    return errno.ENOSPC if _CUT.search(text) else None


def _below(path: Path, folder: Path) -> bool:
    # The folder's siblings too: outputs are first written next to their place.
    return path.absolute().is_relative_to(folder.absolute().parent)
