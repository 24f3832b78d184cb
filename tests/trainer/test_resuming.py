"""Resuming after damage, moves and kills: from the newest complete checkpoint to the identical end, or an error with a remedy."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from hf_continual import KIF, ContinualTrainer, FreezeLayers, GeRe, RecAdam, Replay
from hf_continual.methods.table import TABLE
from hf_continual.trainer.state import last_complete_checkpoint
from hf_continual.trainer.whole import MARKER, damage_of
from tests import toy
from tests.methods import covering

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
READ = ("config.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json")


def rows(seed=9):
    return toy.rows(seed=seed, low=30, high=59)


def methods(cache):
    return [
        Replay(rows(), ratio=0.3),
        GeRe(rows(14), ratio=0.1, cache_dir=str(cache)),
        FreezeLayers(bottom=1),
        KIF(rows(16), inner_steps=2, outer_steps=1),
        RecAdam(anneal="none", pull=0.01),
    ]


def build(folder, *methods, model=None, peft=None, **settings):
    return ContinualTrainer(
        toy.model() if model is None else model,
        SFTConfig(**toy.settings(folder, **{**SAVING, **settings})),
        train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
        peft_config=peft,
        methods=list(methods),
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run with all methods, its final state, and its folder without the last checkpoint."""
    folder = tmp_path_factory.mktemp("straight")
    trainer = build(folder / "run", *methods(folder / "cache"))
    trainer.train()
    shutil.rmtree(folder / "run" / "checkpoint-6")
    return folder, toy.flat(trainer.model).clone()


@pytest.fixture
def world(straight, tmp_path):
    """A copy of that run: its folder, a trainer for it, and the expected final state."""
    folder, end = straight
    shutil.copytree(folder, tmp_path / "w")
    return tmp_path / "w" / "run", lambda: build(tmp_path / "w" / "run", *methods(tmp_path / "w" / "cache")), end


def files_of(checkpoint):
    return sorted(p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file())


def damage(file, how):
    if how == "gone":
        file.unlink()
    else:
        data = file.read_bytes()
        file.write_bytes(data[: 0 if how == "empty" else len(data) // 2])


@pytest.mark.parametrize("how", ["empty", "half", "gone"])
def test_any_damaged_file_is_named_and_the_checkpoint_before_is_taken(world, how, caplog):
    run, _, _ = world
    newest, kept = run / "checkpoint-4", run / "keep"
    shutil.copytree(newest, kept)
    names = [n for n in files_of(newest) if n != "README.md" and (how != "gone" or n != MARKER)]
    assert {"continual/run.json", "continual/kif.json", "continual/kif.safetensors", *READ} <= set(names)
    for name in names:
        caplog.clear()
        damage(newest / name, how)
        assert last_complete_checkpoint(run) == str(run / "checkpoint-2"), name
        assert f"checkpoint-4 is skipped: {name}" in caplog.text
        shutil.copy2(kept / name, newest / name)
    assert last_complete_checkpoint(run) == str(newest)


@pytest.mark.parametrize("name", ["model.safetensors", "continual/kif.json"])
def test_a_run_resumes_from_the_whole_one_to_the_identical_end(world, name):
    run, make, end = world
    damage(run / "checkpoint-4" / name, "empty")
    trainer = make()
    trainer.train(resume_from_checkpoint=True)
    assert torch.equal(toy.flat(trainer.model), end)
    assert damage_of(run / "checkpoint-4") is None  # it was saved again on the way


@pytest.mark.parametrize("how", ["empty", "half", "gone"])
def test_without_a_marker_what_resuming_reads_is_judged(world, how):
    run, _, _ = world
    newest, kept = run / "checkpoint-4", run / "keep"
    (newest / MARKER).unlink()
    assert last_complete_checkpoint(run) == str(newest)
    shutil.copytree(newest, kept)
    needed = {"trainer_state.json", "optimizer.pt", "continual/run.json"}
    for name in needed if how == "gone" else [*READ, "continual/run.json", "continual/kif.safetensors"]:
        damage(newest / name, how)
        assert str(damage_of(newest)).startswith(name), name
        shutil.copy2(kept / name, newest / name)


def test_a_damaged_checkpoint_that_is_asked_for_is_refused_with_the_one_to_take(world):
    run, make, end = world
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    trainer = make()
    with pytest.raises(
        ValueError, match=r"checkpoint-4 cannot be resumed from: optimizer.pt is missing.*checkpoint-2'"
    ):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert torch.equal(toy.flat(trainer.model), end)


def test_no_other_is_whole_and_a_change_on_purpose(world):
    run, make, end = world
    shutil.rmtree(run / "checkpoint-2")
    told = run / "checkpoint-4" / "trainer_state.json"
    told.write_text(json.dumps(json.loads(told.read_text())))
    with pytest.raises(
        ValueError, match=r"trainer_state.json has .* bytes.*No other checkpoint.*remove .*complete.json"
    ):
        make().train(resume_from_checkpoint=str(run / "checkpoint-4"))
    (run / "checkpoint-4" / MARKER).unlink()
    trainer = make()
    trainer.train(resume_from_checkpoint=True)
    assert torch.equal(toy.flat(trainer.model), end)


def test_a_plain_run_gets_no_file_and_resumes_as_sfttrainer_does(tmp_path, caplog):
    straight = build(tmp_path)
    straight.train()
    shutil.rmtree(tmp_path / "checkpoint-6")
    assert not list(tmp_path.rglob("continual")) and not list(tmp_path.glob(".*"))
    damage(tmp_path / "checkpoint-4" / "model.safetensors", "half")
    resumed = build(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(toy.flat(resumed.model), toy.flat(straight.model))
    assert "checkpoint-4 is skipped: model.safetensors cannot be read" in caplog.text
    damage(tmp_path / "checkpoint-4" / "optimizer.pt", "gone")
    assert damage_of(tmp_path / "checkpoint-4") is None
    build(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    with pytest.raises(ValueError, match=r"written without methods .*\['freeze'\].*Resume without methods"):
        build(tmp_path, FreezeLayers(bottom=1)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_save_only_model_resumes_where_no_state_is_lost(tmp_path):
    def ours():
        return build(
            tmp_path / "a",
            FreezeLayers(bottom=1),
            Replay(rows(), ratio=0.3),
            GeRe(rows(14), per_batch=1, cache_dir=str(tmp_path / "cache")),
            save_only_model=True,
        )

    first = ours()
    first.train()
    drawn = first.replay_totals()
    again = ours()
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert again.state.global_step == 6 and (again.replay_totals() == drawn).all()


@pytest.mark.parametrize("method", [lambda: RecAdam(anneal="none", pull=0.01), lambda: KIF(rows(), inner_steps=2)])
def test_save_only_model_is_refused_where_state_is_lost(tmp_path, method):
    build(tmp_path, method(), save_only_model=True).train()
    with pytest.raises(ValueError, match=r"save_only_model=True, so the state of (recadam|kif) is not in it"):
        build(tmp_path, method(), save_only_model=True).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("lora", [False, True])
def test_a_new_run_from_the_weights_of_a_checkpoint_as_the_message_says(tmp_path, lora):
    toy.model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    def peft():
        return LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM") if lora else None

    build(tmp_path / "a", FreezeLayers(bottom=1), model=base, peft=peft()).train()
    checkpoint = str(tmp_path / "a" / "checkpoint-4")
    advice = (
        r"PeftModel.from_pretrained\(base, .*is_trainable=True" if lora else r"ContinualTrainer\(model='.*checkpoint-4'"
    )
    with pytest.raises(ValueError, match=r"freeze.bottom was 1, is 2.*" + advice):
        build(tmp_path / "a", FreezeLayers(bottom=2), peft=peft()).train(resume_from_checkpoint=checkpoint)
    model = checkpoint
    if lora:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = PeftModel.from_pretrained(base, checkpoint, is_trainable=True)
    trainer = build(tmp_path / "b", FreezeLayers(bottom=2), model=model)
    before = toy.flat(trainer.model).clone()
    trainer.train()
    assert trainer.state.global_step == 6 and not torch.equal(before, toy.flat(trainer.model))


@pytest.mark.parametrize("name", ["replay", "gere", "freeze", "kif", "recadam", "anchored"])
def test_a_run_that_was_moved_comes_to_the_identical_end(tmp_path, name):
    def make(root):
        def at(file):
            return str(root / file)

        method = {
            "replay": lambda: Replay(at("old.jsonl"), ratio=0.3),
            "gere": lambda: GeRe(at("old.jsonl"), ratio=0.3, cache_dir=at("cache")),
            "freeze": lambda: FreezeLayers(bottom=1),
            "kif": lambda: KIF(at("old.jsonl"), inner_steps=2, outer_steps=1),
            "recadam": lambda: RecAdam(anneal="none", pull=0.01),
            "anchored": lambda: RecAdam(anneal="none", pull=0.01, anchor=at("base")),
        }[name]()
        return build(root / "run", method, model=AutoModelForCausalLM.from_pretrained(at("base")))

    here, there = tmp_path / "here", tmp_path / "another" / "machine"
    toy.model().save_pretrained(here / "base")
    rows().to_json(here / "old.jsonl")
    straight = make(here)
    straight.train()
    shutil.rmtree(here / "run" / "checkpoint-6")
    shutil.move(here, there)
    moved = make(there)
    moved.train(resume_from_checkpoint=True)
    assert torch.equal(toy.flat(moved.model), toy.flat(straight.model))


@pytest.mark.parametrize("name", ["replay", "gere", "kif"])
def test_other_rows_are_refused_wherever_they_lie(tmp_path, name):
    def make(given):
        method = {
            "replay": lambda: Replay(given, ratio=0.3),
            "gere": lambda: GeRe(given, ratio=0.3, cache_dir=str(tmp_path / "cache")),
            "kif": lambda: KIF(given, inner_steps=2, outer_steps=1),
        }[name]()
        return build(tmp_path / "run", method)

    make(rows()).train()
    with pytest.raises(ValueError, match=f"{name}: the rows are not those that .*checkpoint-6 was trained with"):
        make(rows(seed=10)).train(resume_from_checkpoint=True)


def test_rows_that_are_gone_are_refused(tmp_path):
    build(tmp_path, KIF(rows(), inner_steps=2, outer_steps=1)).train()
    with pytest.raises(ValueError, match="kif: the rows are not those that .*one has none"):
        build(tmp_path, KIF(None, inner_steps=2, outer_steps=1)).train(resume_from_checkpoint=True)


def forked(work, wait=True):
    """Run something in a forked process; its exit status, or its id if not waited for."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            logging.disable(logging.CRITICAL)
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] if wait else child


def test_a_second_trainer_on_a_folder_is_refused_by_name(tmp_path):
    running, told = os.pipe()

    def train():
        trainer = build(tmp_path, FreezeLayers(bottom=1))
        step = trainer.training_step

        def stopped(*args, **kwargs):
            os.write(told, b"!")
            signal.pause()
            return step(*args, **kwargs)

        trainer.training_step = stopped
        trainer.train()

    child = forked(train, wait=False)
    try:
        assert os.read(running, 1) == b"!"
        second = build(tmp_path, FreezeLayers(bottom=1))
        with pytest.raises(
            RuntimeError, match=rf"is being trained into: process {child} on \S+, started 20.*output_dir"
        ):
            second.train()
        build(tmp_path / "elsewhere", FreezeLayers(bottom=1)).train()  # the remedy
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (tmp_path / ".training.json").is_file()
    second.train()  # the lock of a killed process does not block
    assert not list(tmp_path.glob(".training*"))
    build(tmp_path, FreezeLayers(bottom=1)).train()


def dies_at(moment, folder):
    """Kill the process at the n-th time that a file below a folder is opened for writing, renamed or removed."""
    count = [0]

    def seen(event, args):
        if event not in ("open", "os.rename", "os.remove", "os.rmdir") or str(folder) not in str(args[0]):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        count[0] += 1
        if count[0] == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(seen)
    return count


def kill_between_writes(tmp_path, every):
    end = build(tmp_path / "straight", *methods(tmp_path / "cache"))
    end.train()
    wanted = toy.flat(end.model)

    def train(folder, moment, resume=None):
        trainer = build(folder, *methods(tmp_path / "cache"), save_total_limit=1)
        dies_at(moment, folder)
        trainer.train(resume_from_checkpoint=resume)

    moment, killed = 1, 0
    while forked(lambda: train(tmp_path / str(moment), moment)) != 0:
        folder, killed = tmp_path / str(moment), killed + 1
        resumed = build(folder, *methods(tmp_path / "cache"), save_total_limit=1)
        resumed.train(resume_from_checkpoint=last_complete_checkpoint(folder))
        assert torch.equal(toy.flat(resumed.model), wanted), f"killed at the write number {moment}"
        moment += every
    return killed


@pytest.mark.slow
def test_killed_between_two_writes(tmp_path):
    assert kill_between_writes(tmp_path, every=11) >= 4


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_killed_between_any_two_writes(tmp_path):
    assert kill_between_writes(tmp_path, every=1) >= 40


LAST = {"max_steps": 4, "save_steps": 4}  # of 6 steps in an epoch


def ended_twice(folder, names):
    """What a run ends with, and what it ends with once it is resumed from its last checkpoint."""
    ends = []
    for checkpoint in (None, folder / "run" / "checkpoint-4"):
        trainer = ContinualTrainer(
            **covering.start(names),
            args=SFTConfig(**toy.settings(folder / "run", **SAVING | LAST)),
            train_dataset=toy.rows(),
            processing_class=toy.tokenizer(),
            methods=[covering.example(name) for name in names],
        )
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        assert trainer.state.global_step == 4
        ends.append(toy.flat(trainer.model).clone())
    return ends


@pytest.mark.parametrize("names", [(), ("slow_weights",), ("tasl",), ("osft",), ("ewc", "replay")], ids="+".join)
def test_a_run_resumed_at_its_last_step_makes_no_other(tmp_path, names):
    first, second = ended_twice(tmp_path, names)
    assert torch.equal(first, second)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", TABLE)
def test_every_method_resumed_at_its_last_step_ends_as_before(tmp_path, name):
    first, second = ended_twice(tmp_path, (name,))
    assert torch.equal(first, second)
