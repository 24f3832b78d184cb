"""Merges that are killed with SIGKILL at chosen bytes; run as a script, so that torch is imported once for many kills.

python -m tests.merging.kill WORLD_FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from hf_continual import stopping
from hf_continual.merging.engine import writer
from hf_continual.merging.methods.linear import merge_linear
from tests.merging.bytes_of import digest


def merge(world: Path, out: Path, **options: Any) -> None:
    """The merge that is killed."""
    merge_linear(
        [world / "m1", world / "m2"], out, weights=[0.3, 0.7], max_shard_size="300KB", progress=False, **options
    )


def in_child(action: Any) -> int:
    """Run an action in a fork; return minus the signal that ended it, or its exit code."""
    if (pid := os.fork()) == 0:
        try:
            with stopping.listening("The same command resumes."):
                action()
        except SystemExit as stopped:
            sys.stderr.write(f"{stopped}\n")
            os._exit(int(stopped.code or 0))
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finished(out: Path) -> int:
    """Files that the journal of a merge lists as finished."""
    journal = out.parent / f".{out.name}.merging" / "journal.json"
    return len(json.loads(journal.read_text())["finished"]) if journal.is_file() else 0


def killed_after(nbytes: int, action: Any, settled: Path | None = None, number: int = signal.SIGKILL) -> Any:
    """An action that gets a signal once so many bytes of shards are written; with `settled`, not before one more file of
    that output is noted as finished, which on a busy disk happens later."""
    written = 0
    append = writer._Open.append
    before = 0 if settled is None else finished(settled)

    def counted(self: Any, data: memoryview) -> None:
        nonlocal written
        append(self, data)
        written += len(data)
        if written >= nbytes:
            waited = time.monotonic()
            while settled is not None and finished(settled) == before and time.monotonic() < waited + 60:
                time.sleep(0.005)
            writer._Open.append = append
            os.kill(os.getpid(), number)

    def act() -> None:
        writer._Open.append = counted
        action()

    return act


def main() -> None:
    """Print what was found as JSON."""
    world = Path(sys.argv[1])
    merge(world, world / "whole")
    wanted, total = digest(world / "whole"), sum(p.stat().st_size for p in (world / "whole").glob("*.safetensors"))
    found: dict[str, Any] = {"shards": len(wanted), "tenths": []}
    for tenth in range(1, 11):
        out = world / f"out{tenth}"
        settled = out if tenth % 2 == 0 and tenth > 2 else None
        died = in_child(killed_after(total * tenth // 10, lambda out=out: merge(world, out), settled))
        early = out.exists()
        found_finished = finished(out)
        again = in_child(lambda out=out: merge(world, out))
        clean = not (world / f".{out.name}.merging").exists()
        found["tenths"].append([died, early, found_finished, again, digest(out) == wanted, clean])

    # Killed again and again: each attempt gets a little further.
    out, deaths = world / "often", 0
    while in_child(killed_after(350_000, lambda: merge(world, out), out)) == -signal.SIGKILL:
        deaths += 1
    found["often"] = [deaths, digest(out) == wanted]

    # Stopped by a signal: as after a kill, but with a message.
    found["stopped"] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        out = world / f"stopped{number}"
        ended = in_child(killed_after(total // 2, lambda out=out: merge(world, out), out, number))
        left = finished(out)
        again = in_child(lambda out=out: merge(world, out))
        clean = not (world / f".{out.name}.merging").exists()
        found["stopped"].append([ended, left > 0, again, digest(out) == wanted, clean])

    # Another merge over an old output: killed, the old one is complete.
    other = in_child(killed_after(total // 2, lambda: merge(world, world / "often", overwrite=True, dtype="float16")))
    found["old"] = [other, digest(world / "often") == wanted]

    # Two processes: the second is refused while the first holds the lock.
    out, ready = world / "two", world / "ready"

    def slow() -> None:
        rule = writer._check_finite

        def wait(*args: Any) -> None:
            ready.touch()
            while not (world / "go").exists():
                time.sleep(0.01)
            rule(*args)

        writer._check_finite = wait
        merge(world, out)

    if (first := os.fork()) == 0:
        slow()
        os._exit(0)
    while not ready.exists():
        time.sleep(0.01)
    second = in_child(lambda: merge(world, out))
    (world / "go").touch()
    found["two"] = [second, os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]), digest(out) == wanted]
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
