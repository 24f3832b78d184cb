"""Methods on transformers' own Trainer: nothing at zero strength, resumed as if never stopped, handed over, and two ranks are one."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from hf_continual import EWC, MIGU, ContinualCallback, ContinualMixin, FreezeLayers, Method, OLoRA, RecAdam
from hf_continual.data import handover
from hf_continual.trainer.callback import with_methods
from tests import toy
from tests.neighbours import world

ROOT = Path(__file__).parents[2]
NOTHING = {
    "freeze": lambda: FreezeLayers(bottom=1, from_task=1),
    "ewc": lambda: EWC(weight=0.0),
    "o_lora": lambda: OLoRA(weight=0.0),
}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Folder of a model that learned a first task with EWC on plain Trainer."""
    folder = tmp_path_factory.mktemp("first")
    toy.model().save_pretrained(folder / "base")
    world.learn(folder / "task", [EWC(weight=1e5)], model=AutoModelForCausalLM.from_pretrained(folder / "base"))
    return folder / "task"


@pytest.mark.parametrize(("kind", "way"), list(zip(NOTHING, ("callback", "attach", "mixin"), strict=True)))
def test_zero_strength_is_the_plain_trainer(tmp_path, first, kind, way):
    """On what a first task left; the adapter of O-LoRA begins."""
    make = world.adapted if kind == "o_lora" else lambda: AutoModelForCausalLM.from_pretrained(first)
    fresh = {} if kind == "ewc" else {"fresh_methods": True}
    plain = world.learn(tmp_path / "plain", model=make(), seed=5)
    ours = world.learn(tmp_path / "ours", [NOTHING[kind]()], model=make(), seed=5, way=way, **fresh)
    assert torch.equal(toy.flat(plain.model), toy.flat(ours.model))
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (plain, ours)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert not torch.equal(toy.flat(make()), toy.flat(ours.model)), "something was learned"


def test_resumed_is_straight_over_a_second_task(tmp_path, first):
    """EWC holds what the first task left, RecAdam pulls, MIGU masks, and a layer is frozen: all four at once."""
    straight = world.resumed_is_straight(
        tmp_path, world.together, lambda: AutoModelForCausalLM.from_pretrained(first), seed=5
    )
    assert straight.predecessor.names == ["ewc"]
    assert handover.state_of(handover.read(tmp_path / "run"), "ewc")["tasks"] == 2
    logged = [entry for entry in straight.state.log_history if "loss" in entry]
    assert all(entry["recadam/distance"] >= 0 and 0 < entry["freeze/trainable"] < 1 for entry in logged)


def test_resumed_is_straight_on_an_adapter(tmp_path):
    world.resumed_is_straight(tmp_path, world.adapter, world.adapted)


KILLED = """
import os, signal, sys
from transformers import AutoModelForCausalLM, TrainerCallback
from tests.neighbours import world

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

trainer = world.build(sys.argv[1], world.together(), model=AutoModelForCausalLM.from_pretrained(sys.argv[2]), seed=5,
                      save_strategy="steps", save_steps=2)
trainer.add_callback(Kill())
trainer.train()
"""


@pytest.mark.exhaustive
def test_killed_and_resumed_is_straight(tmp_path, first):
    model = lambda: AutoModelForCausalLM.from_pretrained(first)  # noqa: E731
    settings = {"seed": 5, "save_strategy": "steps", "save_steps": 2}
    straight = world.learn(tmp_path / "straight", world.together(), model=model(), **settings)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "run"), str(first)], cwd=ROOT, capture_output=True, text=True, timeout=120,
        check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2"]
    resumed = world.learn(tmp_path / "run", world.together(), model=model(), resume=True, **settings)
    assert torch.equal(toy.flat(straight.model), toy.flat(resumed.model))


@pytest.mark.exhaustive
@pytest.mark.distributed
def test_two_processes_are_one_with_twice_the_accumulation(tmp_path, first):
    from tests.distributed.test_cells import start as launch

    done = launch("tests.neighbours.world", [str(tmp_path / "two"), str(first)])
    assert done.returncode == 0, done.stderr[-4000:]
    got = torch.load(tmp_path / "two" / "result.pt", weights_only=True)
    one = world.learn(
        tmp_path / "one", world.together(), model=AutoModelForCausalLM.from_pretrained(first), seed=5,
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    far = (toy.flat(one.model) - got["straight"]).abs()
    # As in tests/distributed: Adam's first steps divide by gradients near zero, where the last digit decides.
    assert far.quantile(0.999) < 1e-6 and (far > 1e-6).sum() <= 8 and far.max() < 1e-3
    assert torch.equal(got["straight"], got["resumed"])
    mine, theirs = (load_file(tmp_path / place / "continual" / "ewc.safetensors") for place in ("one", "two"))
    for key, tensor in mine.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=1e-3, atol=1e-3 * float(tensor.abs().max()))


def test_the_ways_are_one(tmp_path):
    """Callback, attach and mixin give the same weights, logs and files; the class keeps its name."""
    made = {
        w: world.learn(tmp_path / w, world.together(), way=w, save_strategy="steps", save_steps=4)
        for w in ("callback", "attach", "mixin")
    }
    weights = [toy.flat(t.model) for t in made.values()]
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    assert toy.logs(made["callback"]) == toy.logs(made["attach"]) == toy.logs(made["mixin"])
    files = [sorted(str(p.relative_to(tmp_path / w)) for p in (tmp_path / w).rglob("*") if p.is_file()) for w in made]
    assert files[0] == files[1] == files[2] and "checkpoint-4/continual/complete.json" in files[0]
    assert [type(t).__name__ for t in made.values()] == ["Trainer", "Trainer", "Mixed"]
    assert with_methods(Trainer) is type(made["attach"]) and issubclass(type(made["attach"]), ContinualMixin)


def test_without_methods_the_mixin_is_the_trainer(tmp_path):
    plain, ours = world.learn(tmp_path / "plain", save_strategy="steps", save_steps=4), world.Mixed
    settings = toy.settings(tmp_path / "ours", save_strategy="steps", save_steps=4)
    trainer = ours(
        model=toy.model(), args=type(plain.args)(**settings), train_dataset=world.rows(), data_collator=plain.data_collator,
        processing_class=toy.tokenizer(),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    assert torch.equal(toy.flat(plain.model), toy.flat(trainer.model)) and toy.logs(plain) == toy.logs(trainer)
    files = [
        sorted(str(p.relative_to(f)) for p in f.rglob("*") if p.is_file())
        for f in (tmp_path / "plain", tmp_path / "ours")
    ]
    assert files[0] == files[1]


def test_a_model_of_this_process_and_a_folder_hand_over(tmp_path, first):
    trainer = world.learn(tmp_path / "one", [EWC(weight=1e5)])
    again = world.learn(tmp_path / "two", [EWC(weight=1e5)], model=trainer.model, seed=5)
    assert again.task_states["ewc"]["tasks"] == 2
    named = world.build(
        tmp_path / "three", [EWC()], predecessor=str(first), model=AutoModelForCausalLM.from_pretrained(first)
    )
    assert named.predecessor.names == ["ewc"]
    fresh = world.build(
        tmp_path / "four", [EWC()], fresh_methods=True, model=AutoModelForCausalLM.from_pretrained(first)
    )
    assert fresh.predecessor is None
    with pytest.raises(
        handover.HandOverError,
        match=r"learned, and this run has freeze: .* ContinualCallback\(\.\.\., fresh_methods=True\)",
    ):
        world.build(tmp_path / "five", [FreezeLayers(bottom=1)], model=AutoModelForCausalLM.from_pretrained(first))


def test_a_resumed_run_keeps_its_methods(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    world.learn(tmp_path, [RecAdam(pull=0.05)], **settings)
    with pytest.raises(ValueError, match=r"recadam.pull was 0.05, is 0.1"):
        world.learn(tmp_path, [RecAdam(pull=0.1)], resume=True, **settings)
    world.learn(tmp_path / "plain", **settings)
    with pytest.raises(ValueError, match=r"was written without methods"):
        world.learn(tmp_path / "plain", [RecAdam(pull=0.1)], resume=True, **settings)
    (tmp_path / "checkpoint-4" / "continual" / "run.json").unlink()
    with pytest.raises(
        ValueError, match=r"checkpoint-4 cannot be resumed from: .* newest complete checkpoint .*checkpoint-2"
    ):
        world.learn(tmp_path, [RecAdam(pull=0.05)], resume=str(tmp_path / "checkpoint-4"), **settings)


class Late(TrainerCallback):
    """Adds a callback when training has begun."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        ContinualCallback([EWC()]).attach(self.trainer)


def attached(folder, *more):
    trainer = world.build(folder)
    for callback in more:
        trainer.add_callback(callback(trainer) if isinstance(callback, type) else callback)
    return trainer


WRONG = {
    "no methods": (lambda f: ContinualCallback([]), ValueError, "holds no method"),
    "a class": (lambda f: ContinualCallback([EWC]), TypeError, r"holds the class EWC; put an object there"),
    "one method": (lambda f: ContinualCallback(EWC()), TypeError, r"methods=\[EWC\(\.\.\.\)\]"),
    "a typo": (lambda f: ContinualCallback({"ewcc": {}}), ValueError, "Did you mean 'ewc'"),
    "a wrong option": (lambda f: ContinualCallback({"ewc": {"wieght": 1}}), ValueError, "Did you mean 'weight'"),
    "an index": (lambda f: ContinualCallback([EWC()], task_index=-1), ValueError, "task_index=-1 must be"),
    "not a trainer": (lambda f: ContinualCallback([EWC()]).attach(toy.model()), TypeError, "needs a trainer of transformers, got Llama"),
    "added late": (lambda f: attached(f, ContinualCallback([EWC()])).train(), RuntimeError, r"Write callback.attach\(trainer\) instead"),
    "attached in training": (lambda f: attached(f, Late).train(), ValueError, "Attach the callback before train"),
    "twice": (lambda f: ContinualCallback([EWC()]).attach(world.build(f, [EWC()])), ValueError, r"has methods already \(EWC\)"),
    "two optimizers": (lambda f: world.build(f, [RecAdam(pull=0.1)], optim="sgd"), ValueError, "RecAdam supplies an optimizer and optim='sgd'"),
    "nothing trained": (lambda f: world.build(f, [EWC()], model=toy.model().requires_grad_(False)), ValueError, "No parameter of LlamaForCausalLM"),
    "called by nobody": (lambda f: ContinualCallback([EWC()]).on_train_begin(None, None, None), RuntimeError, "not a trainer of transformers"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_said(tmp_path, case):
    do, error, said = WRONG[case]
    with pytest.raises(error, match=said):
        do(tmp_path)


def test_a_trainer_that_refuses_methods_is_as_it_was(tmp_path, first):
    plain, trainer = world.build(tmp_path / "plain"), world.build(tmp_path / "ours", optim="sgd")
    kind, callbacks = type(trainer), list(trainer.callback_handler.callbacks)
    with pytest.raises(ValueError, match="RecAdam supplies an optimizer"):
        ContinualCallback([RecAdam(pull=0.1)]).attach(trainer)
    assert type(trainer) is kind is type(plain) and trainer.callback_handler.callbacks == callbacks
    trainer = world.build(tmp_path / "ours", model=AutoModelForCausalLM.from_pretrained(first))
    with pytest.raises(handover.HandOverError, match="this run has freeze"):  # after the hooks were set
        ContinualCallback([FreezeLayers(bottom=1, from_task=1)]).attach(trainer)
    assert type(trainer) is kind and [type(c) for c in trainer.callback_handler.callbacks] == [
        type(c) for c in callbacks
    ]
    trainer.train()
    assert trainer.state.global_step == 4


def test_what_methods_leave_goes_with_weights_saved_otherwise(tmp_path):
    callback = ContinualCallback([EWC(weight=1e5)])
    with pytest.raises(ValueError, match="has no trainer yet"):
        callback.leave_in(tmp_path / "out")
    trainer = callback.attach(world.build(tmp_path))
    with pytest.raises(ValueError, match="they do when training ends"):
        callback.leave_in(tmp_path / "out")
    trainer.train()
    with pytest.raises(ValueError, match="Save the model there first"):
        callback.leave_in(tmp_path / "out")
    trainer.model.save_pretrained(tmp_path / "out")
    callback.leave_in(tmp_path / "out")
    assert handover.read(tmp_path / "out").names == ["ewc"]


def test_model_init_is_refused(tmp_path):
    args = world.build(tmp_path).args
    with pytest.raises(ValueError, match=r"Give the model itself: Trainer\(model=model_init\(\)"):
        Trainer(
            model_init=lambda: toy.model(),
            args=args,
            train_dataset=world.rows(),
            callbacks=[ContinualCallback([EWC()])],
        )


@dataclasses.dataclass
class Counting(Method):
    """Of a user: which hooks a plain trainer calls, in which order."""

    name: str = "counting"

    def __post_init__(self):
        self.calls = []

    def prepare(self, run):
        self.calls.append("prepare")

    def begin_task(self, run):
        self.calls.append("begin_task")

    def after_forward(self, run):
        self.calls.append("after_forward")

    def edit_gradients(self, params):
        self.calls.append("edit_gradients")

    def after_step(self, run):
        self.calls.append("after_step")

    def end_step(self, run):
        self.calls.append("end_step")

    def logged(self, run):
        return {"calls": float(len(self.calls))}

    def end_task(self, run):
        self.calls.append("end_task")

    def task_state(self, run):
        self.calls.append("task_state")
        return {"calls": len(self.calls)}


def test_the_hooks_of_a_users_method_come_in_order(tmp_path):
    method = Counting()
    trainer = world.learn(tmp_path, [method], max_steps=1, gradient_accumulation_steps=2)
    assert method.calls == [
        "prepare", "begin_task", "after_forward", "after_forward", "edit_gradients", "after_step", "end_step", "end_task", "task_state",
    ]  # fmt: skip
    assert trainer.state.log_history[0]["counting/calls"] == 7
    assert re.search(
        r'"kind": "tests.neighbours.test_plain_trainer:Counting"', (tmp_path / "continual" / "methods.json").read_text()
    )


def test_migu_masks_what_responds_less(tmp_path):
    """Through the forward passes of a plain trainer: a share of 1 is plain training, less is not."""
    plain, ours = (world.learn(tmp_path / str(share), [MIGU(share=share, first_task=True)]) for share in (1.0, 0.3))
    assert not torch.equal(toy.flat(plain.model), toy.flat(ours.model))
    assert not any(m._forward_hooks for m in ours.model.modules()), "removed at the end"
