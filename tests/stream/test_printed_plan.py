"""`hf-continual run --print-plan`: one run of a sweep as a separate plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from hf_continual.cli import app
from hf_continual.stream.plan_lines import PlanError, Where
from hf_continual.stream.plan_record import plain_plan
from hf_continual.stream.prepare import prepare
from hf_continual.stream.read_plan import check_read, read_plan
from hf_continual.stream.sweep import members
from tests.stream import world

SWEEP = Path(__file__).parents[2] / "recipes" / "baselines" / "sweep.yaml"
DATA = ["data=recipes/data/longseq", "evaluation.gauges.general.rows=recipes/data/longseq/general.heldout.jsonl"]


def printed(plan, *options, only=None):
    asked = ["run", str(plan), *(part for option in options for part in ("--set", option)), "--print-plan"]
    return CliRunner().invoke(app, [*asked, *(["--only", only] if only else [])], catch_exceptions=False).stdout


def test_every_system_of_the_tables_has_its_plan(monkeypatch):
    monkeypatch.chdir(SWEEP.parents[2])
    runs = members(*read_plan(SWEEP, DATA))
    assert len(runs) == 18
    for run in runs:
        alone, _ = check_read(yaml.safe_load(printed(SWEEP, *DATA, only=run.name)), Where())
        wanted = run.plan.model_copy(update={"sweep": None})
        assert alone.model_dump() == wanted.model_dump(), run.name


def test_the_printed_plan_is_the_same_run(tmp_path):
    plan = world.make(
        tmp_path, sweep={"arms": {"plain": {}, "slow": {"sft": {"learning_rate": 1e-3}}}, "seeds": [0, 3]}
    )
    file = world.write(tmp_path, plan)
    text = printed(file, "sft.max_steps=4", only="slow-seed3")
    data = yaml.safe_load(text)
    assert data["seed"] == 3 and data["sft"]["learning_rate"] == 1e-3 and data["sft"]["max_steps"] == 4
    assert (
        "sweep" not in data and data["model"] == str(tmp_path / "model") and data["output_dir"].endswith("/slow-seed3")
    )
    (tmp_path / "one.yaml").write_text(text)
    member = next(m for m in members(*read_plan(file, ["sft.max_steps=4"])) if m.name == "slow-seed3")
    one = prepare(*read_plan(tmp_path / "one.yaml"))
    assert plain_plan(one) == plain_plan(prepare(member.plan, member.where))  # so that its folder is resumed


def test_a_plan_without_a_sweep_prints_itself(tmp_path):
    file = world.write(tmp_path, world.make(tmp_path))
    assert yaml.safe_load(printed(file)) == yaml.safe_load(file.read_text())


def test_what_cannot_be_printed(tmp_path):
    file = world.write(tmp_path, world.make(tmp_path))
    with pytest.raises(PlanError, match="--only x: the plan has no sweep"):
        printed(file, only="x")
    file = world.write(tmp_path, world.make(tmp_path, sweep={"seeds": [0, 1]}))
    with pytest.raises(PlanError, match="no run is named; the sweep's runs are seed0, seed1"):
        printed(file)
    with pytest.raises(PlanError, match="--only seed7 is not one of them"):
        printed(file, only="seed7")
