"""When asked to stop, a plan saves, ends with exit code 75, and resumes to the same matrix, weights and state."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from hf_continual import stopping
from tests.stream import forked, world
from tests.stream.forked import PLANS, STOPPED, chosen, outcome, run


@pytest.fixture(scope="module", params=PLANS)
def quiet(request, tmp_path_factory):
    """A plan, its undisturbed outcome, and how long it takes."""
    folder = tmp_path_factory.mktemp("quiet")
    plan = PLANS[request.param](folder)
    out = folder / "straight"
    started = time.monotonic()
    assert run(plan, out) == 0
    return plan, out, time.monotonic() - started


@pytest.mark.slow
@pytest.mark.timeout(3600)
@chosen("handing over")
@pytest.mark.parametrize("trials", [3, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_random_moments(quiet, tmp_path, trials):
    plan, straight, seconds = quiet
    wanted = outcome(straight)
    for out, code, said in forked.interrupted(plan, seconds, tmp_path, trials, signal.SIGTERM):
        assert code == STOPPED, said
        assert run(plan, out) == 0, f"the run does not resume: {said}"
        assert outcome(out) == wanted, f"another outcome: {said}"


def _signal_in(owner, name, call, number=signal.SIGTERM):
    """Send the process a signal at the n-th call of a function."""
    original, calls = getattr(owner, name), []

    def told(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, name, told)


def _places():
    from hf_continual.methods.kif import KIF
    from hf_continual.stream.learner import PlanLearner
    from hf_continual.trainer import hand_over
    from hf_continual.trainer.hooks import MethodHooks
    from hf_continual.trainer.trainer import ContinualTrainer

    return {
        "in a micro-batch": (ContinualTrainer, "compute_loss", 3),
        "in the last step": (MethodHooks, "on_step_end", 6),
        "while a checkpoint is saved": (ContinualTrainer, "_save_rng_state", 2),
        "at the end of a task": (KIF, "end_task", 2),
        "while a model is saved": (ContinualTrainer, "save_finished", 1),
        "while methods prepare": (hand_over, "before_training", 2),
        "while a model is scored": (PlanLearner, "_scored", 2),
    }


@pytest.mark.slow
@chosen("handing over")
@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("in a micro-batch", signal.SIGTERM),
        ("in the last step", signal.SIGINT),
        ("while a checkpoint is saved", signal.SIGUSR1),
        ("at the end of a task", signal.SIGTERM),
        ("while a model is saved", signal.SIGINT),
        ("while methods prepare", signal.SIGUSR1),
        ("while a model is scored", signal.SIGTERM),
    ],
)
def test_moments(quiet, tmp_path, place, number):
    plan, straight, _ = quiet
    code = run(plan, tmp_path / "out", hook=lambda: _signal_in(*_places()[place], number))
    assert code == STOPPED, (tmp_path / "out.log").read_text()[-3000:]
    assert f"Stopped by {signal.Signals(number).name}" in (tmp_path / "out.log").read_text()
    assert run(plan, tmp_path / "out") == 0
    assert outcome(tmp_path / "out") == outcome(straight)


@pytest.mark.slow
def test_in_accumulation_nothing_is_counted_twice(tmp_path):
    """With transformers' own saving on SIGTERM enabled, too; a stopped task does not count as a learned one."""
    plan = forked.everything_on(tmp_path)
    plan["sft"] |= {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 3,
        "save_strategy": "no",
        "save_only_model": True,
        "max_steps": 3,
        "enable_jit_checkpoint": True,
    }
    assert run(plan, tmp_path / "straight") == 0
    assert run(plan, tmp_path / "out", hook=lambda: _signal_in(*_places()["in a micro-batch"][:2], 5)) == STOPPED
    assert [p.name for p in (tmp_path / "out").glob("task-*")] == ["task-00-t0.partial"]
    assert [p.name for p in (tmp_path / "out").rglob("checkpoint-*")] == ["checkpoint-2"]
    assert run(plan, tmp_path / "out") == 0
    assert outcome(tmp_path / "out") == outcome(tmp_path / "straight")


def test_a_time_limit_stops_as_a_signal_does(tmp_path):
    plan = world.make(tmp_path, methods=[], sft={**world.SFT, "max_steps": 100_000})
    code = run({**plan, "max_minutes": 0.05}, tmp_path / "out")
    said = (tmp_path / "out.log").read_text()
    assert code == STOPPED and "Stopped by max_minutes=0.05 at step" in said, said
    assert list((tmp_path / "out" / "task-00-t0.partial").glob("checkpoint-*"))


def test_the_command_stops_and_resumes(tmp_path):
    plan = world.write(
        tmp_path, world.make(tmp_path, methods=None, sft={**world.SFT, "max_steps": 400, "save_steps": 200})
    )
    command = [sys.executable, "-m", "hf_continual", "run", str(plan)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    partial, deadline = tmp_path / "out" / "task-00-t0.partial", time.monotonic() + 120
    while not partial.is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    said, _ = started.communicate(timeout=60)
    assert started.returncode == STOPPED, said
    assert "Stopped by SIGTERM" in said and "same command resumes" in " ".join(said.split()), said
    assert "Traceback" not in said
    assert subprocess.run(command, capture_output=True, timeout=200, check=False).returncode == 0


class TestSignals:
    def test_a_second_signal_ends_at_once(self, tmp_path):
        plan = world.make(tmp_path, methods=[], sft={**world.SFT, "max_steps": 100_000})

        def hook():
            from hf_continual.trainer.stop import StopAtStep

            def forever(*args, **kwargs):
                os.kill(os.getpid(), signal.SIGTERM)
                threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGTERM]).start()
                while True:
                    time.sleep(0.1)

            StopAtStep.on_substep_end = StopAtStep.on_step_begin = forever

        assert run(plan, tmp_path / "out", hook=hook) == -signal.SIGTERM

    def test_a_handler_of_the_user_and_an_ignored_signal_stay(self):
        heard = []
        before = {n: signal.getsignal(n) for n in (signal.SIGUSR1, signal.SIGTERM)}
        try:
            signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            with stopping.listening(""):
                signal.raise_signal(signal.SIGUSR1)
                signal.raise_signal(signal.SIGTERM)
                assert stopping.asked() is None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        assert heard == [1]

    def test_default_handlers_come_back(self):
        before = [signal.getsignal(n) for n in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)]
        with pytest.raises(stopping.Stopped) as stopped, stopping.listening("again"), stopping.deferred():
            signal.raise_signal(signal.SIGTERM)
            assert stopping.asked() == "SIGTERM"
            stopping.stop("at step 3 of 4")
        assert stopped.value.code == STOPPED and str(stopped.value) == "Stopped by SIGTERM at step 3 of 4."
        assert before == [signal.getsignal(n) for n in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)]
        assert stopping.asked() is None

    def test_outside_a_deferral_it_stops_at_once(self):
        with pytest.raises(stopping.Stopped), stopping.listening(""):
            signal.raise_signal(signal.SIGINT)
            pytest.fail("continued")

    def test_in_a_thread_nothing_is_installed(self):
        def work():
            with stopping.listening("", minutes=10):
                seen.append(stopping.asked())

        seen: list = []
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen == [None]
