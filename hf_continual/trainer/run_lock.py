"""Let only one trainer at a time train into a folder: two would overwrite and rotate away each other's checkpoints.

``OUTPUT_DIR/.training.lock`` is locked by the system while `train` runs, and ``.training.json`` records the holder;
both are removed at the end. The system releases the lock when a process dies for any reason. On NFS (version 4, or with
lockd) the lock also works between machines; on a file system without locks, this is logged and nothing is locked.
"""

from __future__ import annotations

import datetime
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_continual.atomic_files import read_json, write_json
from hf_continual.data.distributed import from_first

logger = logging.getLogger(__name__)

LOCK, OWNER = ".training.lock", ".training.json"
# Data workers of a killed process hold its lock until they notice that it is gone, which takes seconds.
PATIENCE = 20.0


@contextmanager
def held(output_dir: Path) -> Iterator[None]:
    """Hold the lock on a folder while training into it; process 0 holds it for all processes of the run.

    Args:
        output_dir: The run's folder.

    Yields:
        None: While the lock is held.

    Raises:
        RuntimeError: If another process trains into it; names that process.
    """
    locks: list[FileLock | None] = []
    from_first(lambda: locks.append(_take(output_dir)))
    try:
        yield
    finally:
        for lock in locks:
            if lock is not None:
                _remove(output_dir / OWNER)
                _remove(output_dir / LOCK)  # while it is held: filelock does not lock a file that has been unlinked
                lock.release()


def _take(output_dir: Path) -> FileLock | None:
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output_dir / LOCK)
    end = time.monotonic() + PATIENCE
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            owner = _owner(output_dir)
            if _is_alive(owner) or time.monotonic() > end:
                raise RuntimeError(_refusal(output_dir, owner)) from None
            time.sleep(0.2)
        except NotImplementedError:
            logger.warning(
                "%s is on a file system without locks: make sure that only one run trains into it.", output_dir
            )
            return None
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    write_json(output_dir / OWNER, {"pid": os.getpid(), "host": socket.gethostname(), "started": now})
    return lock


def _owner(output_dir: Path) -> dict[str, Any]:
    try:
        return dict(read_json(output_dir / OWNER))
    except (OSError, ValueError, TypeError):
        return {}  # being written, or just removed


def _is_alive(owner: dict[str, Any]) -> bool:
    """Whether the process that took the lock may still run; other hosts' processes cannot be checked."""
    if not owner:
        return False
    if owner.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, KeyError):
        pass
    return True


def _refusal(output_dir: Path, owner: dict[str, Any]) -> str:
    who = "another process"
    if owner:
        who = f"process {owner.get('pid')} on {owner.get('host')}, started {owner.get('started')},"
    return (
        f"{output_dir} is being trained into: {who} holds {output_dir / LOCK}. Two runs would overwrite each other's "
        f"checkpoints. Wait for it to end or stop it, or give this run another output_dir. If no such process runs any "
        f"more, remove {output_dir / LOCK}."
    )


def _remove(file: Path) -> None:
    # Windows cannot remove an open file; a lock file that nobody holds does no harm.
    with suppress(OSError):
        file.unlink()
