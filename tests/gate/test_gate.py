"""The release gate: verdicts by hand, exit codes from a shell, thresholds that are wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_continual.paired import paired_test
from hf_continual.stream.gate import gate
from hf_continual.stream.gate_check import Measured, change, judged, level
from hf_continual.stream.gate_limits import Limit, read_limits
from hf_continual.stream.plan_lines import PlanError
from tests.first_hour.typed import typed
from tests.gate import runs

SCRIPT = Path(__file__).parent / "exit_codes.sh"


@pytest.fixture(scope="module")
def furnished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gate")
    runs.furnish(folder)
    return folder


@pytest.fixture
def here(furnished, monkeypatch):
    monkeypatch.chdir(furnished)
    return furnished


@pytest.mark.slow
def test_every_exit_code_in_a_shell(furnished):
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "HF_CONTINUAL": f"{sys.executable} -m hf_continual", "PYTHONPATH": root}
    ran = subprocess.run(
        ["bash", SCRIPT], cwd=furnished, env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert [line[0] for line in ran.stdout.splitlines()] == list("0022433311")


def test_folders_of_train(tmp_path):
    """Before and after its own training, against another, and what such a folder cannot say."""
    worse = runs.write_trained(tmp_path / "worse", runs.shares(0.8), runs.shares(0.6))
    same = runs.write_trained(tmp_path / "same", runs.shares(0.8), runs.shares(0.8))
    (tmp_path / "gate.yaml").write_text("tasks: {law: {max_drop: 0.05}}")
    found = gate(worse, tmp_path / "gate.yaml")
    assert found.verdict == "regression" and "tasks.law changed by -0.200" in found.reason
    assert "from before training" in found.reason
    assert gate(same, tmp_path / "gate.yaml").verdict == "pass"
    assert gate(worse, same).verdict == "regression" and gate(same, worse).verdict == "pass"
    (tmp_path / "gate.yaml").write_text("tasks: {law: {min: 0.7}}")
    assert gate(worse, tmp_path / "gate.yaml").verdict == "regression"
    unscored = runs.write_trained(tmp_path / "unscored", None, None)
    with pytest.raises(ValueError, match="no scores after its training. Train with --test"):
        gate(unscored, same)


def test_the_command(here, capsys):
    code, out, _ = typed("gate worse --against released", capsys)
    assert code == 2 and "tasks.t0" in out and "regression" in out.splitlines()[-1]
    reason = typed("gate worse --against released --quiet", capsys)[1]
    assert reason.count("\n") == 1 and "tasks.t0 changed by -0.200" in reason and "a drop of 0.02 is allowed" in reason
    code, out, _ = typed("gate worse --against released --json", capsys)
    found = json.loads(out)
    assert code == 2 and found["exit_code"] == 2 and found["reason"] == reason.strip()
    by_name = {c["name"]: c for c in found["checks"]}
    assert list(by_name) == ["overall_performance", "tasks.t0", "tasks.t1", "gauges.general"]
    assert by_name["tasks.t1"]["verdict"] == "pass" and by_name["tasks.t1"]["value"] == pytest.approx(0.05)
    assert by_name["tasks.t0"]["p_value"] < 1e-6 and by_name["gauges.general"]["verdict"] == "pass"
    assert typed("gate better --against released --margin -1", capsys)[0] == 3
    assert typed("gate better --against released --marign 1", capsys)[0] == 3
    code, _, err = typed("gate better --against kept.yaml --margin 0.1", capsys)
    assert code == 3 and "write margin: 0.1 in the file" in err
    code, _, err = typed("gate nowhere --against released", capsys)
    assert code == 3 and "not the folder of a run" in err
    assert typed("score nowhere --test x", capsys)[0] == 2  # the other verbs keep theirs


def test_drops_within_a_run_and_limits_of_the_figures(here):
    found = {(c.name, c.kind): c for c in gate("worse", "kept.yaml").checks}
    t0 = found["tasks.t0", "max_drop"]
    assert t0.verdict == "regression" and t0.value == pytest.approx(-0.4) and t0.since == "right after it was learned"
    assert found["tasks.t1", "max_drop"].value == 0 and found["tasks.t1", "max_drop"].verdict == "pass"
    assert found["forgetting", "max"].value == pytest.approx(0.4) and found["forgetting", "max"].verdict == "regression"
    assert found["overall_performance", "min"].where == "kept.yaml, line 1, overall_performance.min"
    assert found["gauges.general", "max_drop"].since == "the base model"
    assert gate("better", "kept.yaml").verdict == "pass"


def test_verdicts_by_hand():
    drop = Limit("tasks.a", "max_drop", 0.02)

    def verdict(limit, value, low, high, checks=1):
        return judged(limit, Measured(value, 100, lambda c: (low, high)), checks, 0.05, 0.8).verdict

    assert verdict(drop, 0.0, -0.019, 0.019) == "pass"
    assert verdict(drop, 0.0, -0.021, 0.021) == "insufficient"  # holds both 0 and the margin
    assert verdict(drop, -0.05, -0.08, -0.02) == "regression"
    assert verdict(drop, -0.05, -0.11, 0.01) == "insufficient"
    assert verdict(drop, -0.015, -0.025, -0.005) == "insufficient"  # surely worse, whether by more than allowed is open
    least, most = Limit("forgetting", "min", 0.8), Limit("forgetting", "max", 0.1)
    assert [verdict(least, *v) for v in ((0.85, 0.81, 0.9), (0.7, 0.6, 0.79), (0.78, 0.7, 0.86))] == [
        "pass", "regression", "insufficient",
    ]  # fmt: skip
    assert [verdict(most, *v) for v in ((0.05, 0.02, 0.1), (0.2, 0.11, 0.3), (0.2, 0.09, 0.3))] == [
        "pass", "regression", "insufficient",
    ]  # fmt: skip
    assert judged(drop, Measured(0.0, 1, lambda c: None), 1, 0.05, 0.8).verdict == "insufficient"


def test_false_alarms_and_misses_are_as_rare_as_promised():
    """Runs that are equally good by construction are called worse in at most alpha of all gates of four checks."""
    rng = np.random.default_rng(0)
    alarms = passes = misses = 0
    for _ in range(100):
        checks, worse = [], []
        for k in range(4):
            first = (rng.random(300) < 0.7).astype(float)
            same = np.where(rng.random(300) < 0.3, (rng.random(300) < 0.7).astype(float), first)
            lost = same * (rng.random(300) > 0.2)  # 14 points worse
            pair = [change({"a": list(first)}, {"a": list(map(float, s))}, "x") for s in (same, lost)]
            checks.append(judged(Limit(f"tasks.{k}", "max_drop", 0.0), pair[0], 4, 0.05, 0.8).verdict)
            worse.append(judged(Limit(f"tasks.{k}", "max_drop", 0.02), pair[1], 4, 0.05, 0.8).verdict)
        alarms += "regression" in checks
        misses += worse[0] != "regression"
        passes += worse[0] == "pass"
    assert alarms <= 0.05 * 100 + 5 and passes == 0 and misses < 0.05 * 100


def test_the_rows_that_would_tell_are_about_right():
    rng = np.random.default_rng(1)

    def pair(n):
        first = (rng.random(n) < 0.7).astype(float)
        second = np.where(rng.random(n) < 0.3, (rng.random(n) < 0.7).astype(float), first)
        return change({"a": list(first)}, {"a": list(second)}, "x")

    limit = Limit("tasks.a", "max_drop", 0.03)
    needed = judged(limit, pair(400), 1, 0.05, 0.8).rows_needed
    assert needed is not None and 500 < needed < 3000
    passed = np.mean([judged(limit, pair(needed), 1, 0.05, 0.8).verdict == "pass" for _ in range(100)])
    assert 0.6 < passed < 0.95


def test_the_confidence_is_that_of_the_interval():
    first, second = runs.shares(0.7, changed=0.2), runs.shares(0.7, seed=3, changed=0.3)
    wide, narrow = (paired_test({"a": first}, {"a": second}, confidence=c).interval for c in (0.99, 0.8))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    a, b = runs.losses(3.0, 50), runs.losses(3.0, 50, 1)
    wide, narrow = (paired_test({"a": a}, {"a": b}, confidence=c).interval for c in (0.99, 0.8))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    low, high = level(a).interval(0.95)
    assert low < 3.0 < high


WRONG = {
    "- a": "thresholds are a mapping",
    "alpha: 0.05": "nothing to check",
    "overal_performance: {min: 1}": "line 1.*unknown key 'overal_performance'. Did you mean 'overall_performance'",
    "\nforgetting: 0.1": "line 2, forgetting: must hold limits.*and is 0.1",
    "forgetting: {mx: 0.1}": "line 1, forgetting.mx: unknown limit 'mx'. Did you mean 'max'",
    "forgetting: {max: '80 %'}": "must be a number, and is '80 %'",
    "forgetting: {max_drop: 0.1}": "Limit it with max",
    "backward_transfer: {max_drop: 0.1}": "Limit it with min",
    "overall_performance: {max_drop: 0.1}": "Add baseline: FOLDER",
    "overall_performance: {min: 0.9, max: 0.8}": "nothing can pass",
    "tasks: 3": "mapping of names to limits",
    "tasks: {a: {max_drop: -0.1}}": "written without a sign",
    "margin: 0.1": "there is none. Add baseline",
    "baseline: 3": "must be the folder of a run, and is 3",
    "alpha: 1\nforgetting: {max: 0.1}": "line 1, alpha: must lie between 0 and 1",
    "tasks:\n  a: {min: .nan}": "line 2, tasks.a.min: must be a number",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_thresholds(text, tmp_path):
    (tmp_path / "gate.yaml").write_text(text)
    with pytest.raises(PlanError, match=f"(?s){WRONG[text]}"):
        read_limits(tmp_path / "gate.yaml")


def test_what_was_not_measured_is_an_error(here, tmp_path):
    def held(text, run="better"):
        (tmp_path / "gate.yaml").write_text(text)
        return gate(run, tmp_path / "gate.yaml")

    with pytest.raises(PlanError, match=r"line 1, tasks.t7.min: better has no task 't7'.*It has t0, t1"):
        held("tasks: {t7: {min: 0.5}}")
    runs.write_run(tmp_path / "single", [{"t0": runs.shares(0.5)}])
    with pytest.raises(ValueError, match="forgetting was not measured"):
        held("forgetting: {max: 0.5}", tmp_path / "single")
    with pytest.raises(ValueError, match="single was not scored on t1, general, on which released was"):
        gate(tmp_path / "single", "released")
    runs.write_run(tmp_path / "short", [{"t0": runs.shares(0.5, 20)}])
    with pytest.raises(ValueError, match=r"scored on different rows .*\(20 and 400 rows\)"):
        gate(tmp_path / "single", tmp_path / "short")
    # The same run passes against itself, and a baseline in the file is a comparison as on the command line.
    assert held("baseline: released\nmargin: 0.02").to_dict() == gate("better", "released").to_dict()
