"""Rates and batch sizes come from the live optimizer, its scheduler and the trainer, not from the arguments."""

from __future__ import annotations

import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, SequentialLR

from hf_continual import KIF, ContinualConfig, ContinualTrainer, RecAdam
from hf_continual.methods.kif.flat_adam import FlatAdam
from hf_continual.methods.recadam.optimizer import recall_share
from hf_continual.trainer.facts import run_facts
from hf_continual.trainer.rates import peak_and_factor, remember_peaks
from tests import toy


def groups(*rates, sizes=None, lr=1e-3):
    sizes = sizes or [4] * len(rates)
    made = [{"params": [torch.nn.Parameter(torch.zeros(n))], "lr": r} for r, n in zip(rates, sizes, strict=True)]
    return torch.optim.AdamW(made, lr=lr)


def half(optimizer):
    return LambdaLR(optimizer, lambda step: 0.5)


@pytest.mark.parametrize(
    "optimizer, peak",
    [
        (groups(3e-4, lr=3e-4), 3e-4),
        (groups(0.0, 3e-4, lr=3e-4), 3e-4),
        (groups(7e-2, 3e-4, sizes=[90, 2], lr=3e-4), 3e-4),
        (groups(2e-3, 5e-3, sizes=[3, 8]), 5e-3),
        (groups(0.0, 5e-3, sizes=[30, 8]), 5e-3),
    ],
)
def test_one_group_stands_for_the_run_whatever_the_others_are(optimizer, peak):
    assert peak_and_factor(optimizer, half(optimizer)) == (peak, pytest.approx(0.5))


def test_all_rates_zero_have_no_schedule():
    optimizer = groups(0.0, 0.0, lr=0.0)
    assert peak_and_factor(optimizer, half(optimizer)) == (0.0, 1.0)


def test_the_peak_of_other_schedulers():
    optimizer = groups(1e-3)
    plateau = ReduceLROnPlateau(optimizer, factor=0.25, patience=0)
    remember_peaks(optimizer)
    for value in (1.0, 2.0):
        plateau.step(value)
    assert peak_and_factor(optimizer, plateau) == (1e-3, pytest.approx(0.25))
    again = groups(1e-3)
    again.load_state_dict(optimizer.state_dict())  # a resumed run knows where it came from
    remember_peaks(again)
    assert peak_and_factor(again, plateau) == (1e-3, pytest.approx(0.25))

    optimizer = groups(1e-3)
    cycle = OneCycleLR(optimizer, max_lr=0.02, total_steps=10, div_factor=20)
    assert peak_and_factor(optimizer, cycle) == (0.02, pytest.approx(0.05))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.01)
    assert peak_and_factor(optimizer, CyclicLR(optimizer, 0.01, 0.04)) == (0.04, pytest.approx(0.25))
    optimizer = groups(1e-3)
    parts = [LambdaLR(optimizer, lambda step: 0.1), LambdaLR(optimizer, lambda step: 1.0)]
    assert peak_and_factor(optimizer, SequentialLR(optimizer, parts, [3])) == (1e-3, pytest.approx(0.1))


@pytest.fixture
def rates(monkeypatch):
    seen = []
    step = FlatAdam.step
    monkeypatch.setattr(FlatAdam, "step", lambda self, lr: (seen.append(float(lr)), step(self, lr))[1])
    return seen


def kif(**options):
    return KIF(toy.rows(seed=9, low=30, high=59), inner_steps=2, outer_steps=1, **options)


def build(folder, *methods, model=None, optimizers=(None, None), **settings):
    return ContinualTrainer(
        toy.model() if model is None else model,
        ContinualConfig(**toy.settings(folder, lr_scheduler_type="constant", **settings)),
        train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
        optimizers=optimizers,
        methods=methods,
    )


@pytest.mark.parametrize("asked, wanted", [(4e-4, 4e-4), (None, 2e-3)])
def test_the_outer_learner_next_to_a_given_optimizer(tmp_path, rates, asked, wanted):
    model = get_peft_model(toy.model(), LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=8.0)
    method = kif(outer_learning_rate=asked)
    trainer = build(tmp_path, method, model=model, optimizers=(optimizer, None), learning_rate=7e-5)
    trainer.train()
    assert run_facts(trainer).settings["learning_rate"] == 2e-3  # what the model card says
    assert rates == pytest.approx([wanted] * 2)


def test_the_outer_learner_follows_a_given_scheduler(tmp_path, rates):
    model = toy.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    build(tmp_path, kif(outer_learning_rate=1e-3), model=model, optimizers=(optimizer, schedule)).train()
    assert rates == pytest.approx([1e-3 / 3, 1e-3 / 5])


@pytest.mark.parametrize("own", [0.0, 3e-2])
def test_the_outer_learner_next_to_groups(tmp_path, rates, own):
    recall = RecAdam(anneal="none", anchor_strength=1.0, groups={"embed_tokens|layers.0": {"lr": own}})
    build(tmp_path, recall, kif(outer_learning_rate=6e-4), learning_rate=2e-3).train()
    assert rates == pytest.approx([6e-4] * 2)


def test_the_pull_is_the_same_in_every_group(tmp_path):
    own = {"embed_tokens": {"lr": 0.04}, "mlp": {"lr": 2e-5}, "norm": {"lr": 0.0}, "lm_head": {"anchor_strength": 2.0}}
    trainer = build(tmp_path, RecAdam(anneal="none", pull=0.03, groups=own), max_steps=1)
    trainer.train()
    shares = {g["lr"]: recall_share(g, 1)[1] for g in trainer.run.optimizer.param_groups if g["anchor_strength"] != 2.0}
    assert shares == {0.04: pytest.approx(0.03), 2e-5: pytest.approx(0.03), 1e-3: pytest.approx(0.03), 0.0: 0.0}
    assert {recall_share(g, 1)[1] for g in trainer.run.optimizer.param_groups if g["anchor_strength"] == 2.0} == {2e-3}


@pytest.mark.parametrize("shared, updates", [("shared", 9), ("separate", 6), ("none", 6)])
def test_a_share_of_the_run_counts_the_updates_that_another_method_adds(tmp_path, shared, updates):
    recall = RecAdam(t0=0.5, pull=0.01, groups={"lm_head": {"t0": 0.25}})
    trainer = build(tmp_path, recall, kif(outer_optimizer=shared), max_steps=6)
    trainer.train()
    optimizer = trainer.run.optimizer
    assert {int(state["step"]) for state in optimizer.state.values()} == {updates}
    assert sorted({g["t0"] for g in optimizer.param_groups}) == [updates / 4, updates / 2]


@pytest.mark.parametrize("asked", [None, 8])
def test_memory_steps_take_the_batch_that_fits(tmp_path, asked):
    """A device with memory for 3 rows; 6 are requested, and 6 or 8 of the buffer."""
    trainer = build(
        tmp_path, kif(memory_batch=asked), per_device_train_batch_size=6, auto_find_batch_size=True, max_steps=2
    )
    inner, sizes = type(trainer).compute_loss, []

    def compute_loss(self, model, inputs, *args, **kwargs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 4:
            raise RuntimeError("CUDA out of memory. (said by a test)")
        return inner(self, model, inputs, *args, **kwargs)

    trainer.compute_loss = types.MethodType(compute_loss, trainer)
    trainer.train()
    assert trainer.state.global_step == 2
    live = trainer.run.batch_size
    assert run_facts(trainer).settings["per_device_train_batch_size"] == live
    assert live < 6 and sizes[-1] == (live if asked is None else 8 * live // 6)
    assert len(next(trainer.run.batches(trainer.run.prepare(toy.rows(seed=3)), None))["input_ids"]) == live
