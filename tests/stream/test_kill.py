"""SIGKILL at any moment: the same plan goes on and ends with the matrix, the figures and the weights of a quiet run.

The runs are forked from a process that has imported everything, so that a run takes seconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from hf_continual import train_stream
from hf_continual.durable import read_json
from tests.stream import world


def run(plan: dict, out: Path, kill: float | None = None, hook=None) -> bool:
    """Run a plan in a forked process, killed after some seconds; whether it came to its end."""
    # Every run records the general samples' states for itself, so that this too is interrupted.
    gere = {**plan["methods"][0]["gere"], "cache_dir": f"{out}-states"}
    plan = {**plan, "methods": [{"gere": gere}, *plan["methods"][1:]]}
    child = os.fork()
    if child == 0:
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            torch.set_num_threads(1)
            if hook is not None:
                hook()
            train_stream(plan, output_dir=str(out))
            code = 0
        finally:
            os._exit(code)
    if kill is None:
        return os.waitpid(child, 0)[1] == 0
    end = time.monotonic() + kill
    while time.monotonic() < end:
        if (done := os.waitpid(child, os.WNOHANG))[0]:
            assert done[1] == 0
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == 0


def outcome(out: Path) -> dict:
    """Everything that must not depend on a kill: all results, all predictions, all weights."""
    files = {p.name: p.read_text() for p in sorted((out / "predictions").iterdir()) if not p.name.startswith(".")}
    weights = [world.weights(out / f"task-0{i}-t{i}").sum().item() for i in range(3)]
    return {"results": read_json(out / "continual_results.json"), "predictions": files, "weights": weights}


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """A plan with everything on, its undisturbed outcome, and how long it takes."""
    folder = tmp_path_factory.mktemp("quiet")
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
    out = folder / "straight"
    assert run(plan, out)
    started = time.monotonic()
    assert run(plan, folder / "again")
    assert outcome(folder / "again") == outcome(out), "two undisturbed runs must agree before a killed one can"
    return plan, out, time.monotonic() - started


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("trials", [5, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_random_moments(quiet, tmp_path, trials):
    """One random moment in each of so many equal parts of the run; every new run of the tests tries others."""
    plan, straight, seconds = quiet
    seed = random.SystemRandom().randrange(2**32)
    moments = [seconds * (i + random.Random(seed + i).random()) / trials for i in range(trials)]
    wanted = outcome(straight)
    for i, moment in enumerate(moments):
        for attempt in range(8):
            out = tmp_path / f"{i}-{attempt}"
            if not run(plan, out, kill=moment):
                break
            moment *= 0.6  # it ended before: the machine has less to do now than when the run was timed
        else:
            pytest.fail(f"seed {seed}, trial {i}: no run lasted for {moment:.3f} s, they cannot be killed")
        assert run(plan, out), f"seed {seed}, trial {i}: the run does not go on after a kill at {moment:.3f} s"
        assert outcome(out) == wanted, f"seed {seed}, trial {i}: another outcome after a kill at {moment:.3f} s"
        for k in range(3):
            assert torch.equal(world.weights(out / f"task-0{k}-t{k}"), world.weights(straight / f"task-0{k}-t{k}"))
        assert not list(out.rglob("*.partial")) and not list(out.rglob("checkpoint-*"))


def _kill_in(module: str, name: str, call: int):
    """Kill the process in the middle of the n-th call of a function: after half of a file was written."""
    import importlib

    owner_name, _, attribute = name.rpartition(".")
    owner = importlib.import_module(module)
    owner = getattr(owner, owner_name) if owner_name else owner
    original, calls = getattr(owner, attribute), []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, attribute, killed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        ("os", "fsync", 5),  # a file of predictions is written and not in its place
        ("hf_continual.stream.scores", "write_json", 4),  # predictions are there, their score is not
        ("hf_continual.stream.folders", "shutil.rmtree", 1),  # scored, checkpoints not removed
        ("pathlib", "Path.rename", 2),  # everything is there but the folder's name
        ("hf_continual.trainer.trainer", "ContinualTrainer.save_model", 3),  # inside a checkpoint
        ("hf_continual.trainer.state", "write_state", 2),
        ("torch", "save", 2),  # the optimizer's state
        ("hf_continual.stream.run", "collect", 2),  # a task is finished, the results do not know it yet
    ],
)
def test_moments_between_writes(quiet, tmp_path, module, name, call):
    plan, straight, _ = quiet
    assert not run(plan, tmp_path, hook=lambda: _kill_in(module, name, call)), "the moment was not met"
    assert run(plan, tmp_path)
    assert outcome(tmp_path) == outcome(straight)


def test_a_killed_run_leaves_no_lock(quiet, tmp_path):
    plan, _, seconds = quiet
    assert not run(plan, tmp_path, kill=seconds / 3)
    assert json.loads((tmp_path / "plan.json").read_text())["seed"] == 0
    assert run(plan, tmp_path)
