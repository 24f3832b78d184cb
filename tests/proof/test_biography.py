"""The Biography experiment with the paper's architecture: its plans, its table, and a small run from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROOF = ROOT / "recipes" / "proof"


@pytest.fixture
def biography(monkeypatch):
    monkeypatch.syspath_prepend(str(PROOF))
    import biography

    yield biography
    for name in ("biography", "plans"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("preset", ["gpu-biography", "gpu-biography-short", "smoke-biography"])
def test_every_arm_is_a_plan(biography, preset, tmp_path):
    from hf_continual.stream.read_plan import read_plan

    size = {**biography.read("biography")[preset], "old": 12, "new": 4}
    for folder in ("model-seed0", "base-seed0/task-00-read", "base-seed0/task-01-old"):
        (tmp_path / folder).mkdir(parents=True)
    base, _ = read_plan(biography.base_plan(size, 0, tmp_path))
    assert [t.name for t in base.tasks] == ["read", "old"]
    for arm in size["arms"]:
        plan, _ = read_plan(biography.arm_plan(arm, size, 0, tmp_path))
        own = arm.partition("-")[0] in ("ewc", "lamol")
        assert [t.name for t in plan.tasks] == (["old", "new"] if own else ["new"])
        assert plan.tasks[-1].curve[-1] == size["task"]["new_steps"]
        assert bool(plan.methods) == (arm != "seq")
    assert {f"freeze-{n}" for n in range(1, 9)} <= set(size["arms"]) or preset == "smoke-biography"


def test_the_full_size_reads_200_million_tokens(biography):
    for preset in ("gpu-biography", "gpu-biography-short"):
        how = biography.read("biography")[preset]["read"]
        assert 1.99e8 < how["steps"] * how["batch"] * how["length"] < 2.01e8


def test_replayed_rows_are_never_among_those_not_shown_again(biography, tmp_path):
    size = {**biography.read("biography")["gpu-biography"], "old": 20, "new": 4}
    for arm, number in (("replay-20", 24), ("replay-50", 60)):
        (method,) = biography.methods_of(arm, size, 0, tmp_path)
        rows = [json.loads(line) for line in Path(method["replay"]["rows"]).read_text().splitlines()]
        kept = {r["prompt"] for r in biography.biography_rows(10, skip=10, seed=0)}
        assert len(rows) == number and method["replay"]["per_batch"] == 24 and not kept & {r["prompt"] for r in rows}


def test_arms_are_compared_where_the_new_task_is_learned(biography):
    def point(old, new):
        return {name: {"value": v} for name, v in ((biography.OLD, old), (biography.UNSHOWN, old), ("new", new))}

    results = {"curves": {"new": {"0": point(1.0, 0.0), "50": point(0.5, 0.96), "100": point(0.1, 1.0)}}, "cells": {"new": point(0.1, 1.0)}, "versions": {}}  # fmt: skip
    got = biography.result({"arm": "freeze-7", "seed": 0}, results)
    assert got["learned_at"] == 50
    stored = json.loads(json.dumps(got))
    assert "| `freeze-7` | 0 | 10.0 | 10.0 | 100.0 | 50: 50.0 | 39.7; 44.2 |" in biography.table([stored])
    results["curves"]["new"]["50"]["new"]["value"] = results["curves"]["new"]["100"]["new"]["value"] = 0.9
    assert "not reached" in biography.table(
        [json.loads(json.dumps(biography.result({"arm": "seq", "seed": 0}, results)))]
    )


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_small_run_from_end_to_end(tmp_path):
    command = [sys.executable, str(PROOF / "run.py"), "--preset", "smoke-biography", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {f.stem: json.loads(f.read_text()) for f in (tmp_path / "results").glob("*.json")}
    assert set(found) == {f"smoke-biography-{arm}-seed0" for arm in ("seq", "freeze-1", "replay-50", "ewc-1e6")}
    assert all((list(r["curve"]) == ["0", "2", "4"] and r["methods"] == []) or r["methods"] for r in found.values())
    assert (tmp_path / "biography.md").read_text().count("\n| `") == 4
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "train_loss" not in again.stdout
