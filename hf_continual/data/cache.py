"""Files shared by several runs: one run makes them, the others wait, and a full disk gives a clear error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from hf_continual.data.distributed import from_first
from hf_continual.disk import FULL, CannotWrite, free_space, size


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Lock a file while one run makes it; other runs that need it wait.

    Args:
        file: The file; its folder is created.

    Yields:
        None: While process 0 of this run holds the lock.

    Raises:
        OSError: If it cannot be written.
    """
    lock = FileLock(file.with_suffix(".lock"))

    def take() -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            raise cannot_write(file, error, "recorded values of rows are kept there") from error

    from_first(take)
    try:
        yield
    finally:
        lock.release()


def cannot_write(file: Path, error: Exception, why: str) -> OSError:
    """The error for a cache file that cannot be written."""
    said, number = getattr(error, "strerror", None) or error, getattr(error, "errno", None)
    room = f" ({size(free_space(file))} are free there)" if number in FULL else ""
    return CannotWrite(
        number, f"{file} could not be written: {said}{room}. Free space or choose another cache_dir; {why}."
    )
