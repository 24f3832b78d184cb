"""Runs, models and rows that were moved: recognised by their content, not by their path."""

from __future__ import annotations

import shutil

import pytest
import torch

from hf_continual import train_stream
from hf_continual.atomic_files import read_json
from hf_continual.stream.plan_lines import PlanError
from tests.stream import world
from tests.stream.test_damage import SHORT, Stopped, measured


def moved(plan, old, new):
    """A plan with every path under one folder moved to another."""
    if isinstance(plan, dict):
        return {k: moved(v, old, new) for k, v in plan.items()}
    if isinstance(plan, list):
        return [moved(v, old, new) for v in plan]
    return plan.replace(str(old), str(new)) if isinstance(plan, str) else plan


@pytest.mark.parametrize("peft", [None, {"r": 2, "target_modules": ["q_proj"]}])
def test_everything_is_moved(tmp_path, monkeypatch, peft):
    from hf_continual.trainer.trainer import ContinualTrainer

    here, there = tmp_path / "here", tmp_path / "elsewhere" / "there"
    here.mkdir()
    general = {"replay": {"rows": str(here / "general.jsonl"), "ratio": 0.3, "row_type": "text"}}
    plan = world.make(here, sft=SHORT, methods=general, memory={"rows": 2}, peft=peft)
    plan["tasks"] = plan["tasks"][:2]
    plan["evaluation"]["gauges"] = {"general": {"rows": str(here / "general.jsonl"), "split": "train"}}
    straight = train_stream(plan, output_dir=str(here / "straight"))
    original, calls = ContinualTrainer._save_checkpoint, []

    def stops(self, *args, **kwargs):
        original(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 3:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(ContinualTrainer, "_save_checkpoint", stops)
        train_stream(plan)
    there.parent.mkdir()
    shutil.move(here, there)
    plan = moved(plan, here, there)
    resumed = train_stream(plan)
    assert measured(resumed.results) == measured(straight.results)
    for i in range(2):
        one, two = (there / out / f"task-0{i}-t{i}" for out in ("straight", "out"))
        same = world.adapter if peft else lambda folder: {"all": world.weights(folder)}
        assert all(torch.equal(a, b) for a, b in zip(same(one).values(), same(two).values(), strict=True))
    monkeypatch.setattr(ContinualTrainer, "train", None)
    before = {p: p.stat().st_mtime_ns for p in there.rglob("*.safetensors")}
    again = train_stream(plan, output_dir=str(there / "straight"))
    assert measured(again.results) == measured(straight.results)
    assert before == {p: p.stat().st_mtime_ns for p in there.rglob("*.safetensors")}
    assert str(here) not in read_json(there / "straight" / "plan.json")["model"]["path"]


def test_what_lies_at_the_old_place_and_is_another(tmp_path):
    plan = world.make(
        tmp_path,
        sft=SHORT,
        methods={"replay": {"rows": str(tmp_path / "general.jsonl"), "ratio": 0.3, "row_type": "text"}},
    )
    plan["tasks"] = plan["tasks"][:1]
    train_stream(plan)
    rows = tmp_path / "general.jsonl"
    whole = rows.read_text()
    rows.write_text(whole.replace("w1", "w2"))
    with pytest.raises(PlanError, match=r"methods\.replay\.rows"):
        train_stream(plan)
    rows.write_text(whole)
    from tests import toy

    toy.model(seed=5).save_pretrained(tmp_path / "model")
    with pytest.raises(PlanError, match=r"started with another plan:\s+model\.files\.model\.safetensors"):
        train_stream(plan)


def test_a_base_that_is_gone(tmp_path):
    plan = world.make(tmp_path, sft=SHORT)
    plan["tasks"] = plan["tasks"][:1]
    train_stream(plan)
    shutil.move(tmp_path / "model", tmp_path / "moved")
    with pytest.raises(PlanError, match=r"model: the model: the folder .*/model does not exist.*give its new path"):
        train_stream(plan)
    assert train_stream({**plan, "model": str(tmp_path / "moved")}).results["complete"], "the way out"
