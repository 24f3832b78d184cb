"""A method's state goes with the model: loaded from folders, refused where it does not belong."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_continual import ContinualConfig, ContinualTrainer, FreezeLayers, Method, Paper, Replay
from hf_continual.data import handover
from hf_continual.data.handover import HandOverError
from tests import toy


@dataclass
class Counting(Method):
    """Counts tasks and records its calls."""

    name: str = "counting"
    paper: ClassVar[Paper] = Paper("Counting", "Nobody", 2026)
    calls: list[str] = field(default_factory=list, init=False, compare=False)
    tasks: int = field(default=0, init=False, compare=False)
    seen: torch.Tensor | None = field(default=None, init=False, compare=False)

    def load_task_state(self, state, run):
        self.calls.append("load_task_state")
        self.tasks, self.seen = state["tasks"], state["seen"]

    def prepare(self, run):
        self.calls.append(f"prepare at {run.step}")
        self.at_prepare = toy.flat(run.model)

    def edit_rows(self, run, rows):
        self.calls.append("edit_rows")
        return rows

    def begin_task(self, run):
        self.calls.append(f"begin_task at {run.step}")

    def end_task(self, run):
        self.calls.append("end_task")

    def task_state(self, run):
        self.calls.append("task_state")
        return {"tasks": self.tasks + 1, "seen": torch.full((3,), float(self.tasks))}


def train(start, folder, methods, *, seed=1, peft=None, resume=None, save=True, **settings):
    trainer = ContinualTrainer(
        start, ContinualConfig(**toy.settings(folder, **settings)), train_dataset=toy.rows(seed=seed),
        processing_class=toy.tokenizer(), peft_config=peft, methods=methods,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    if save:
        trainer.save_model()
    return trainer


@pytest.fixture
def first(tmp_path):
    train(toy.model(), tmp_path / "first", [Counting()])
    return tmp_path / "first"


def test_three_scripts_count_three_tasks(tmp_path, first):
    second = train(str(first), tmp_path / "second", [method := Counting()])
    assert method.calls == [
        "load_task_state", "prepare at 0", "edit_rows", "begin_task at 0", "end_task", "task_state",
    ]  # fmt: skip
    assert method.tasks == 1 and torch.equal(method.seen, torch.zeros(3))
    third = train(AutoModelForCausalLM.from_pretrained(tmp_path / "second"), tmp_path / "third", [method := Counting()])
    assert method.tasks == 2 and torch.equal(method.seen, torch.ones(3))
    listed = json.loads((tmp_path / "third" / "continual" / "methods.json").read_text())
    assert listed["task"] == {"name": "task", "index": 0}
    assert [m["kind"] for m in listed["methods"]] == ["tests.trainer.test_hand_over:Counting"]
    assert second.predecessor.names == third.predecessor.names == ["counting"]


def test_a_resumed_run_takes_over_and_prepares_with_the_weights_of_its_start(tmp_path, first):
    settings = {"save_strategy": "steps", "save_steps": 2}
    train(str(first), tmp_path / "second", [whole := Counting()], **settings)
    train(
        str(first), tmp_path / "second", [resumed := Counting()], resume=str(tmp_path / "second" / "checkpoint-2"), **settings
    )  # fmt: skip
    assert resumed.calls[:4] == ["load_task_state", "prepare at 0", "edit_rows", "begin_task at 2"]
    assert torch.equal(whole.at_prepare, resumed.at_prepare)


def test_without_state_no_file_is_written_and_what_lay_there_goes(tmp_path, first):
    assert (first / "continual" / "methods.json").is_file()
    for methods in ([], [Replay(toy.rows(seed=2), ratio=0.2)]):
        shutil.copytree(first, tmp_path / "again", dirs_exist_ok=True)
        train(toy.model(), tmp_path / "again", methods)
        assert handover.read(tmp_path / "again") is None
    train(toy.model(), tmp_path / "plain", [])
    assert not (tmp_path / "plain" / "continual").exists()


def test_another_set_of_methods_is_refused_and_can_begin_afresh(tmp_path, first, caplog):
    replay = Replay(toy.rows(seed=2), ratio=0.2)
    with pytest.raises(
        HandOverError,
        match=r"model of task 'task', comes with what method 'counting' .* learned, and this run has replay",
    ):
        train(str(first), tmp_path / "other", [replay])
    with pytest.raises(HandOverError, match=r"this run has a 'replay' of that name"):
        train(str(first), tmp_path / "other", [Replay(toy.rows(seed=2), ratio=0.2, name="counting")])
    train(str(first), tmp_path / "other", [fresh := Counting()], fresh_methods=True)
    assert fresh.tasks == 0 and "load_task_state" not in fresh.calls
    train(str(first), tmp_path / "none", [])
    assert "this run has no methods and ignores it" in caplog.text


def test_other_weights_next_to_it_are_refused(tmp_path, first):
    weights = load_file(first / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, first / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HandOverError, match=r"model.safetensors has changed since the methods counting of task 'task'"):
        train(str(first), tmp_path / "second", [Counting()])


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("methods.json", "{", "methods.json is damaged"),
        ("methods.json", '{"format": 1}', "methods.json is damaged"),
        ("counting.json", "{}", "counting.json is damaged: its checksum differs"),
        ("counting.safetensors", None, "counting.safetensors is missing; it holds what method 'counting' learned"),
    ],
)
def test_damaged_files_are_named(tmp_path, first, file, content, said):
    path = first / "continual" / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(HandOverError, match=said):
        train(str(first), tmp_path / "second", [Counting()])


def test_a_list_cannot_lead_out_of_its_folder(tmp_path, first):
    file = first / "continual" / "methods.json"
    data = json.loads(file.read_text())
    data["methods"][0]["files"] = {"../../secret.json": {"bytes": 1, "xxh3_128": ""}}
    file.write_text(json.dumps(data))
    with pytest.raises(HandOverError, match="is not the name of a file in its folder"):
        train(str(first), tmp_path / "second", [Counting()])


class Cut(Exception):
    """The process ends here."""


def saves(monkeypatch, cut_at: int | None) -> list[str]:
    """Count disk operations while a hand-over is written, and stop before one of them."""
    done: list[str] = []

    def watched(name: str, call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if len(done) == cut_at:
                raise Cut(name)
            done.append(name)
            return call(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(handover, "save_file", watched("save_file", handover.save_file))
    monkeypatch.setattr(handover, "write_json", watched("write_json", handover.write_json))
    monkeypatch.setattr(Path, "replace", watched("replace", Path.replace))
    monkeypatch.setattr(Path, "unlink", watched("unlink", Path.unlink))
    monkeypatch.setattr(handover.shutil, "rmtree", watched("rmtree", shutil.rmtree))
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", watched("model", PreTrainedModel.save_pretrained))
    return done


def test_cut_between_any_two_writes_it_is_both_or_neither(tmp_path, first, monkeypatch):
    """A second task is saved into the folder of the first: the folder holds one of the two completely, or is refused."""
    trainer = train(str(first), tmp_path / "second", [Counting()], save=False)
    kept = tmp_path / "kept"
    shutil.copytree(first, kept)
    with monkeypatch.context() as patched:
        done = saves(patched, None)
        trainer.save_finished(str(first))
        count = len(done)
    assert count >= 8, done
    outcomes = set()
    for cut in range(count):
        shutil.rmtree(first)
        shutil.copytree(kept, first)
        with monkeypatch.context() as patched, pytest.raises(Cut):
            saves(patched, cut)
            trainer.save_finished(str(first))
        weights = load_file(first / "model.safetensors")["model.norm.weight"]
        new = torch.equal(weights, trainer.model.model.norm.weight)
        try:
            found = handover.read(first)
        except HandOverError as refused:
            assert "ContinualConfig(fresh_methods=True)" in str(refused)
            outcomes.add("refused")
            continue
        assert found is not None
        assert handover.state_of(found, "counting")["tasks"] == (2 if new else 1)
        outcomes.add("new" if new else "old")
    assert {"old", "refused"} <= outcomes
    trainer.save_finished(str(first))
    assert handover.state_of(handover.read(first), "counting")["tasks"] == 2


def test_a_checkpoint_of_an_unfinished_task_leaves_nothing(tmp_path, caplog):
    train(toy.model(), tmp_path / "first", [Counting()], save_strategy="steps", save_steps=2)
    train(str(tmp_path / "first" / "checkpoint-2"), tmp_path / "second", [method := Counting()])
    assert method.tasks == 0 and "is a checkpoint of an unfinished task" in caplog.text


def lora(rank: int = 2) -> LoraConfig:
    return LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")


def test_an_adapter_folder_is_continued_or_built_on(tmp_path):
    toy.model().save_pretrained(tmp_path / "base")
    train(str(tmp_path / "base"), tmp_path / "first", [Counting()], peft=lora())
    continued = train(str(tmp_path / "first"), tmp_path / "more", [more := Counting()])
    stacked = train(str(tmp_path / "first"), tmp_path / "stacked", [on_top := Counting()], peft=lora(3))
    assert more.tasks == on_top.tasks == 1
    assert {p.shape[0] for n, p in continued.model.named_parameters() if p.requires_grad and ".lora_A." in n} == {2}
    assert {p.shape[0] for n, p in stacked.model.named_parameters() if p.requires_grad and ".lora_A." in n} == {3}
    saved = json.loads((tmp_path / "stacked" / "adapter_config.json").read_text())
    assert saved["r"] == 5
    assert handover.state_of(handover.read(tmp_path / "stacked"), "counting")["tasks"] == 2


def test_another_base_under_the_same_adapter_is_refused(tmp_path):
    toy.model().save_pretrained(tmp_path / "base")
    train(str(tmp_path / "base"), tmp_path / "first", [Counting()], peft=lora())
    toy.model(seed=7).save_pretrained(tmp_path / "base")
    with pytest.raises(
        HandOverError, match=r"was trained on the base 'base', and this run's base 'base' has different weights"
    ):
        train(str(tmp_path / "first"), tmp_path / "second", [Counting()])


@dataclass
class Halving(Method):
    """Keeps every second row, without its first label."""

    paper: ClassVar[Paper] = Paper("Halving", "Nobody", 2026)
    name: str = "halving"

    def edit_rows(self, run, rows):
        kept = rows.select(range(0, len(rows), 2))
        return kept.map(lambda row: {"labels": [-100, -100, *row["labels"][2:]]})


def test_edited_rows_are_what_is_trained_and_edited_once(tmp_path):
    trainer = train(toy.model(), tmp_path, [Halving()], save=False)
    assert len(trainer.run.task_rows) == 12
    assert all(row["labels"][:2] == [-100, -100] for row in trainer.run.task_rows)
    trainer.train()
    assert len(trainer.run.task_rows) == 12

    class Emptying(Halving):
        def edit_rows(self, run, rows):
            return rows.select([])

    with pytest.raises(ValueError, match=r"Emptying.edit_rows must return a Dataset of at least one row"):
        train(toy.model(), tmp_path, [Emptying()])
    with pytest.raises(ValueError, match="the rows are a stream"):
        config = ContinualConfig(**toy.settings(tmp_path))
        ContinualTrainer(
            toy.model(), config, train_dataset=toy.rows().to_iterable_dataset(), processing_class=toy.tokenizer(),
            methods=[Halving()],
        ).train()  # fmt: skip


def test_what_a_method_froze_stays_frozen_under_a_stack_that_is_resumed(tmp_path):
    toy.model().save_pretrained(tmp_path / "base")
    train(str(tmp_path / "base"), tmp_path / "first", [Counting()], peft=lora())
    settings = {"save_strategy": "steps", "save_steps": 2}

    def second(**kwargs):
        methods = [Counting(), FreezeLayers(bottom=2)]
        return train(str(tmp_path / "first"), tmp_path / "second", methods, peft=lora(), **settings, **kwargs)

    straight, resumed = second(), second(resume=str(tmp_path / "second" / "checkpoint-2"))
    assert torch.equal(toy.flat(straight.model), toy.flat(resumed.model))
    trained = [n for n, p in resumed.model.named_parameters() if p.requires_grad]
    assert trained and not [n for n in trained if ".layers.0." in n or ".layers.1." in n or ".earlier." in n]


def test_what_a_list_names_is_not_imported(tmp_path, first):
    """The list may be someone else's: a kind that is not a method of the table names a module of their choice."""
    file = first / "continual" / "methods.json"
    listed = json.loads(file.read_text())
    listed["methods"][0]["kind"] = "this:Class"  # a module of Python that prints when it is imported
    file.write_text(json.dumps(listed))
    sys.modules.pop("this", None)
    with pytest.raises(HandOverError, match="(a 'this:Class'"[1:]):
        train(str(first), tmp_path / "second", [FreezeLayers(bottom=1)])
    assert "this" not in sys.modules
