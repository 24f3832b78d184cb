"""SIGKILL at any time: the same plan resumes and ends with the same matrix, figures, weights and methods' state."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from tests.stream import forked
from tests.stream.forked import PLANS, chosen, outcome, run


@pytest.fixture(scope="module", params=PLANS)
def quiet(request, tmp_path_factory):
    """A plan, its undisturbed outcome, and how long it takes."""
    folder = tmp_path_factory.mktemp("quiet")
    plan = PLANS[request.param](folder)
    out = folder / "straight"
    assert run(plan, out) == 0
    started = time.monotonic()
    assert run(plan, folder / "again") == 0
    assert outcome(folder / "again") == outcome(out), "two undisturbed runs must agree before a killed one can"
    return plan, out, time.monotonic() - started


@pytest.mark.slow
@pytest.mark.timeout(3600)
@chosen("handing over")
@pytest.mark.parametrize("trials", [3, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_random_moments(quiet, tmp_path, trials):
    """One random time in each of several equal parts of the run; every test run tries different ones."""
    plan, straight, seconds = quiet
    wanted = outcome(straight)
    for out, code, said in forked.interrupted(plan, seconds, tmp_path, trials, signal.SIGKILL):
        assert code == -signal.SIGKILL, said
        assert run(plan, out) == 0, f"the run does not resume: {said}"
        assert outcome(out) == wanted, f"another outcome: {said}"
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
@chosen("everything")
@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        ("os", "fsync", 5),  # a file of predictions is written but not in place
        # predictions exist, their score does not
        pytest.param("hf_continual.stream.scores", "write_json", 4, marks=pytest.mark.exhaustive),
        # scored, checkpoints not removed
        pytest.param("hf_continual.stream.folders", "shutil.rmtree", 1, marks=pytest.mark.exhaustive),
        ("pathlib", "Path.rename", 2),  # everything is there except the folder's name
        ("hf_continual.trainer.trainer", "ContinualTrainer.save_model", 3),  # inside a checkpoint
        pytest.param("hf_continual.trainer.state", "write_state", 2, marks=pytest.mark.exhaustive),
        pytest.param("torch", "save", 2, marks=pytest.mark.exhaustive),  # the optimizer's state
        ("hf_continual.stream.run_plan", "collect", 2),  # a task is finished, the results do not include it yet
    ],
)
def test_moments_between_writes(quiet, tmp_path, module, name, call):
    plan, straight, _ = quiet
    assert run(plan, tmp_path, hook=lambda: _kill_in(module, name, call)), "the moment was not met"
    assert run(plan, tmp_path) == 0
    assert outcome(tmp_path) == outcome(straight)


@chosen("everything")
def test_a_killed_run_leaves_no_lock(quiet, tmp_path):
    plan, _, seconds = quiet
    assert run(plan, tmp_path, after=seconds / 3) == -signal.SIGKILL
    assert json.loads((tmp_path / "plan.json").read_text())["seed"] == 0
    assert run(plan, tmp_path) == 0
