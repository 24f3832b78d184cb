"""Every method of the table on transformers' Trainer: built, inert at zero strength, resumed; or refused with what to use instead."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hf_continual import EWC, KIF, ContinualCallback, ContinualConfig, ContinualTrainer
from hf_continual.methods.table import TABLE
from hf_continual.trainer.any_trainer import why_not, works_anywhere
from tests import toy
from tests.methods import covering
from tests.neighbours import world

ANYWHERE = [kind for kind in TABLE if works_anywhere(kind)]


def acting(kind):
    """The example of a method's test file, with rows that are tokenised."""
    method = covering.module(kind).example(None)
    return dataclasses.replace(method, memory=world.rows(9)) if kind == "kif" else method


def inert(kind):
    """The same at zero strength."""
    method = covering.module(kind).zero(None)
    return dataclasses.replace(method, memory=world.rows(9)) if kind == "kif" else method


def start(kind):
    """What a run with a method starts from."""
    return world.adapted() if covering.adapters_only([kind]) else toy.model()


@pytest.mark.parametrize("kind", TABLE)
def test_each_method_is_refused_or_built(tmp_path, kind):
    """As the table says, whose word is that of the hooks."""
    method = acting(kind)
    assert works_anywhere(kind) == (why_not(method) is None)
    if works_anywhere(kind):
        world.build(tmp_path, [method], model=start(kind))
        return
    name = type(method).__name__
    with pytest.raises(ValueError, match=rf"^{name} on .*: it .*\. Train with ContinualTrainer\("):
        ContinualCallback([method])
    with pytest.raises(ValueError, match=rf"^{name} on Mixed: it .*, or drop {name}\.$"):
        world.build(tmp_path, [method], way="mixin", model=start(kind))


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ANYWHERE)
def test_zero_strength_of_every_method(tmp_path, kind):
    module = covering.module(kind)
    settings = getattr(module, "ZERO_SETTINGS", {})
    plain = world.learn(tmp_path / "plain", model=start(kind), **settings)
    ours = world.learn(tmp_path / "ours", [inert(kind)], model=start(kind), **settings)
    far = (toy.flat(plain.model) - toy.flat(ours.model)).abs().max()
    assert far <= module.ZERO_TOLERANCE
    if not module.ZERO_TOLERANCE:
        losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (plain, ours)]
        assert losses[0] == losses[1]
    assert (toy.flat(start(kind)) - toy.flat(ours.model)).abs().max() > 1e-4, "something was learned"


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ANYWHERE)
def test_every_method_acts_and_resumes(tmp_path, kind):
    """Alone, on a model that learned a first task with it where only that makes it act."""

    def model():
        if not getattr(covering.module(kind), "NEEDS_PREDECESSOR", False):
            return start(kind)
        if covering.adapters_only([kind]):
            return PeftModel.from_pretrained(toy.model(), tmp_path / "first", is_trainable=True)
        return AutoModelForCausalLM.from_pretrained(tmp_path / "first")

    further = {}
    if getattr(covering.module(kind), "NEEDS_PREDECESSOR", False):
        assert world.learn(tmp_path / "first", [acting(kind)], model=start(kind)).task_states
        further = {"predecessor": str(tmp_path / "first")}
    straight = world.resumed_is_straight(tmp_path, lambda: [acting(kind)], model, seed=5, **further)
    plain = world.learn(tmp_path / "plain", model=model(), seed=5, gradient_accumulation_steps=2)
    assert not torch.equal(toy.flat(straight.model), toy.flat(plain.model)), f"{kind} did nothing"


def test_raw_rows_need_a_trainer_that_tokenises(tmp_path):
    with pytest.raises(
        ValueError, match=r"the columns text, .* Give rows that have input_ids and labels, or train with Cont"
    ):
        world.build(tmp_path, [KIF(toy.rows(), inner_steps=2, outer_steps=1)])


def test_continual_trainer_takes_methods_itself(tmp_path):
    trainer = ContinualTrainer(
        toy.model(), ContinualConfig(**toy.settings(tmp_path)), train_dataset=toy.rows(), processing_class=toy.tokenizer()
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"takes methods itself, and more of them: ContinualTrainer\(\.\.\., methods="):
        ContinualCallback([EWC()]).attach(trainer)
