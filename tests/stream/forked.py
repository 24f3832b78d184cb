"""Runs of a plan in forked processes that get a signal at some point: everything is imported, so a run takes seconds."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from hf_continual import stopping, train_stream
from hf_continual.atomic_files import read_json
from tests.stream import world

STOPPED = 75


def run(
    plan: dict[str, Any],
    out: Path,
    after: float | None = None,
    number: int = signal.SIGKILL,
    hook: Callable[[], None] | None = None,
) -> int:
    """Run a plan, and send it a signal after so many seconds.

    Args:
        plan: The plan.
        out: Its folder.
        after: Seconds until the signal; None sends none.
        number: The signal.
        hook: Called in the process before the run.

    Returns:
        Its exit code; minus the signal that ended it.
    """
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os._exit(_child(plan, out, hook, tell))
    os.close(tell)
    os.read(ready, 1)
    os.close(ready)
    end = None if after is None else time.monotonic() + after
    while not (done := os.waitpid(child, os.WNOHANG if end else 0))[0]:
        if end is not None and time.monotonic() > end:
            os.kill(child, number)
            end = None
        else:
            time.sleep(0.002)
    return os.waitstatus_to_exitcode(done[1])


def _child(plan: dict[str, Any], out: Path, hook: Callable[[], None] | None, tell: int) -> int:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    # Its lock is in shared memory: a process killed while holding it would block all later ones.
    tqdm.set_lock(threading.RLock())
    try:
        sys.stdout = sys.stderr = said = Path(f"{out}.log").open("a", buffering=1)
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        logging.basicConfig(level=logging.WARNING, stream=said, force=True)
        torch.set_num_threads(1)
        with stopping.listening(""):
            os.write(tell, b"x")
            if hook is not None:
                hook()
            # Every run records the general samples' states itself, so that this is interrupted, too.
            methods = [dict(m) for m in plan["methods"]]
            for method in methods:
                if "gere" in method:
                    method["gere"] = {**method["gere"], "cache_dir": f"{out}-states"}
            train_stream({**plan, "methods": methods}, output_dir=str(out))
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def interrupted(
    plan: dict[str, Any], seconds: float, folder: Path, trials: int, number: int
) -> Iterator[tuple[Path, int, str]]:
    """One run interrupted at a random time in each of `parts` equal parts of its duration.

    Yields:
        The folder of a run that did not end, its exit code, and a description for failures.
    """
    seed = random.SystemRandom().randrange(2**32)
    for i in range(trials):
        moment = seconds * (i + random.Random(seed + i).random()) / trials
        for attempt in range(8):
            out = folder / f"{i}-{attempt}"
            if code := run(plan, out, after=moment, number=number):
                said = Path(f"{out}.log").read_text()[-2000:]
                yield out, code, f"seed {seed}, trial {i}, signal after {moment:.3f} s: {said}"
                break
            moment *= 0.6  # it had already ended: the machine is less busy now than when the run was timed
        else:
            raise AssertionError(f"seed {seed}, trial {i}: no run lasted for {moment:.3f} s")


def outcome(out: Path) -> dict[str, Any]:
    """Everything that must not depend on an interruption: all results, all predictions, all weights, all that was learned."""
    files = {p.name: p.read_text() for p in sorted((out / "predictions").iterdir()) if not p.name.startswith(".")}
    tasks = sorted(p for p in out.glob("task-*") if p.is_dir())
    learned = {}
    for task in tasks:
        learned |= {f"{task.name}/{p.name}": p.read_bytes() for p in sorted((task / "continual").glob("*.safetensors"))}
        if (file := task / "continual" / "methods.json").is_file():
            found = read_json(file)
            learned[str(file.relative_to(out))] = {k: found[k] for k in ("task", "base", "weights")} | {
                "methods": [(m["name"], m["files"]) for m in found["methods"]]
            }
    return {
        "results": read_json(out / "continual_results.json"),
        "predictions": files,
        "weights": {str(p.relative_to(out)): p.read_bytes() for t in tasks for p in sorted(t.glob("*.safetensors"))},
        "learned": learned,
    }


def chosen(first: str) -> Any:
    """Parametrise the fixture `quiet`: one plan in `make test`, the other in `make test-all`."""
    marks = [pytest.param(name, marks=[] if name == first else pytest.mark.exhaustive) for name in PLANS]
    return pytest.mark.parametrize("quiet", marks, indirect=True)


def everything_on(folder: Path) -> dict[str, Any]:
    """A plan of full models with every kind of method that shares a run."""
    plan = world.make(
        folder,
        methods=[
            {"gere": {"rows": str(folder / "general.jsonl"), "per_batch": 1, "weight": "dynamic"}},
            {"replay": {"rows": "earlier_tasks", "ratio": 0.3}},
            {"freeze": {"bottom": 1}},
            {"kif": {"memory": "kept", "inner_steps": 3, "outer_steps": 1}},
            {"recadam": {"anneal": "none", "pull": 0.01}},
        ],
        memory={"rows": 4},
    )
    plan["evaluation"]["gauges"] = {"general": {"rows": str(folder / "general.jsonl"), "split": "train"}}
    return plan


def handing_over(folder: Path) -> dict[str, Any]:
    """A plan of adapters whose methods learn from task to task: a Fisher, bases, masks, general states."""
    return world.make(
        folder,
        peft={"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": True},
        between_tasks="new_adapter",
        methods=[
            {"gere": {"rows": str(folder / "general.jsonl"), "per_batch": 1, "weight": "dynamic"}},
            {"ewc": {"weight": 10.0}},
            {"o_lora": {}},
            {"kif": {"memory": "kept", "inner_steps": 3, "outer_steps": 1}},
        ],
        memory={"rows": 4},
    )


PLANS = {"everything": everything_on, "handing over": handing_over}
