"""Slow weights: the average by hand, in a run and on its checkpoints, resumed, after a rollback, and in low precision."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

from hf_continual import ContinualConfig, ContinualTrainer, SlowWeights
from hf_continual.methods.slow_weights import averaged
from tests import toy
from tests.methods.fake_run import FakeRun

ZERO_TOLERANCE = 0.0


def example(world):
    return SlowWeights(decay=0.6)


def zero(world):
    return SlowWeights(decay=0.0)


def test_the_average_by_hand():
    slow = torch.tensor([1.0, -2.0, 0.5])
    found = averaged(slow, torch.tensor([3.0, 2.0, 0.5]), 0.75)
    torch.testing.assert_close(found, torch.tensor([1.5, -1.0, 0.5]), rtol=0, atol=1e-6)
    assert found is slow
    averaged(slow, torch.tensor([0.0, 0.0, 1.0]), 0.2)
    torch.testing.assert_close(slow, torch.tensor([0.3, -0.2, 0.9]), rtol=0, atol=1e-6)


def steps(method, values, dtype=torch.float32, max_steps=None):
    """The method over a model of one weight that takes these values, the first before training."""
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    run = FakeRun(model, max_steps=max_steps or len(values) - 1)

    def put(value):
        with torch.no_grad():
            model.weight.fill_(value)

    put(values[0])
    method.begin_task(run)
    for run.step, value in enumerate(values[1:], 1):
        put(value)
        method.end_step(run)
        assert model.weight.item() == value  # training goes on from the weights themselves
    return model, run


def test_a_task_by_hand():
    """From the start: 0.5 (0.5 (0.5 0 + 0.5 8) + 0.5 4) + 0.5 2 = 3."""
    for method, expected in (
        (SlowWeights(decay=0.5), 3.0),
        (SlowWeights(decay=0.5, every=2), 2.0),  # step 2 only: 0.5 0 + 0.5 4
        (SlowWeights(decay=0.5, warmup=0.34), 4.0),  # from step 1: 0.5 (0.5 8 + 0.5 4) + 0.5 2
        (SlowWeights(decay=0.0), 2.0),
    ):
        model, run = steps(method, [0.0, 8.0, 4.0, 2.0])
        method.end_task(run)
        assert model.weight.item() == pytest.approx(expected, abs=1e-6), method
    method = SlowWeights(decay=0.5, warmup=0.5)
    model, run = steps(method, [0.0, 8.0, 4.0], max_steps=10)  # ended before the average started
    method.end_task(run)
    assert model.weight.item() == 4.0


def test_constant_weights_stay_and_the_average_lies_between():
    method = SlowWeights(decay=0.9)
    model, run = steps(method, [0.375] * 20)
    method.end_task(run)
    assert model.weight.item() == pytest.approx(0.375, abs=1e-7)
    values = [0.0, *torch.randn(20, generator=torch.Generator().manual_seed(0)).tolist()]
    model, run = steps(method, values, torch.float64)
    method.end_task(run)
    assert min(values) < model.weight.item() < max(values)


def test_weights_that_were_put_back_start_the_average_again():
    method = SlowWeights(decay=0.5)
    model, run = steps(method, [0.0, 8.0, 4.0], max_steps=3)
    with torch.no_grad():
        model.weight.fill_(-1.0)
    method.weights_replaced(run)
    with torch.no_grad():
        model.weight.fill_(3.0)
    run.step = 3
    method.end_step(run)
    method.end_task(run)
    assert model.weight.item() == pytest.approx(1.0, abs=1e-6)  # 0.5 (-1) + 0.5 3
    late = SlowWeights(decay=0.5, warmup=0.9)
    model, run = steps(late, [0.0, 8.0], max_steps=10)
    late.weights_replaced(run)  # before the average has started
    assert late.state_dict(run) == {}


def test_the_average_of_bfloat16_weights_is_float32():
    """Steps below bfloat16's resolution at 1 add up: 0.99 of the average, each weight 2^-7 above it."""
    method = SlowWeights(decay=0.99)
    model, run = steps(method, [1.0, *[1.0 + 2**-7] * 100], torch.bfloat16)
    (slow,) = method.state_dict(run).values()
    assert slow.dtype == torch.float32
    assert float(slow) == pytest.approx(1.0 + 2**-7 * (1 - 0.99**100), abs=1e-6)
    method.end_task(run)
    assert model.weight.dtype == torch.bfloat16


def train(folder, methods, peft=None, resume=None, **settings):
    given = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, **settings}
    trainer = ContinualTrainer(
        toy.model(), ContinualConfig(**toy.settings(folder, **given)), train_dataset=toy.rows(),
        processing_class=toy.tokenizer(), peft_config=peft, methods=methods,
    )  # fmt: skip
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer, start


def lora():
    return LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("every", "warmup", "first"), [(1, 0.0, 0), (2, 0.34, 2)])
def test_the_average_of_a_runs_own_checkpoints(tmp_path, peft, every, warmup, first):
    """The run's weights are plain fine-tuning's, its result is their average."""
    adapter, file = (lora(), "adapter_model.safetensors") if peft else (None, "model.safetensors")
    train(tmp_path / "plain", [], adapter)
    _, start = train(tmp_path / "ours", [SlowWeights(0.7, every, warmup)], adapter)
    # The start by the names in the files: PEFT leaves out the adapter's.
    slow = {n.replace(".default", ""): p.double() for n, p in start.items()}
    for step in range(1, 7):
        plain = load_file(tmp_path / "plain" / f"checkpoint-{step}" / file)
        ours = load_file(tmp_path / "ours" / f"checkpoint-{step}" / file)
        assert all(torch.equal(ours[n], w) for n, w in plain.items())
        if step <= first:
            slow = {n: w.double() for n, w in plain.items()}
        elif (step - first) % every == 0:
            slow = {n: 0.7 * slow[n] + 0.3 * w.double() for n, w in plain.items()}
    result = load_file(tmp_path / "ours" / file)
    for name, weight in result.items():
        torch.testing.assert_close(weight.double(), slow[name], rtol=0, atol=1e-6)
    assert any((weight - plain[name]).abs().max() > 1e-4 for name, weight in result.items())


@pytest.mark.parametrize("saved", [2, 3, 5, 6])
def test_resumed_before_and_after_the_start(tmp_path, saved):
    def methods():
        return [SlowWeights(decay=0.7, every=2, warmup=0.5)]

    straight, _ = train(tmp_path, methods(), lora())
    checkpoint = tmp_path / f"checkpoint-{saved}"
    assert (checkpoint / "continual" / "slow_weights.safetensors").is_file() == (saved >= 3)
    resumed, _ = train(tmp_path, methods(), lora(), resume=str(checkpoint))
    assert torch.equal(toy.flat(straight.model), toy.flat(resumed.model))


def test_a_rule_that_rolls_back_leaves_the_weights_put_back(tmp_path):
    """Nothing is averaged after a rollback, because it ends the run: the result are the weights put back."""
    gauges = {"general": toy.rows(seed=8, low=40, high=59), "every": 1}
    rule = {"gauges": gauges, "rollback_if": "general/loss_change > 0.0001", "learning_rate": 1e-2}
    trainer, _ = train(tmp_path / "ours", [SlowWeights(decay=0.7)], **rule)
    plain, _ = train(tmp_path / "plain", [], **rule)
    assert trainer.state.global_step < 6 and "rolled back" in trainer.ended
    assert torch.equal(toy.flat(trainer.model), toy.flat(plain.model))


def test_sentences(tmp_path):
    for wrong, error, said in (
        ({"decay": 1.0}, ValueError, r"decay=1.0\) must lie between 0 and 1, 1 excluded. It is the share"),
        ({"decay": "a"}, TypeError, "must be a number"),
        ({"every": 0}, ValueError, "must be at least 1"),
        ({"every": 1.5}, TypeError, "must be a whole number"),
        ({"warmup": 1.0}, ValueError, r"warmup=1.0\) must lie between 0 and 1, 1 excluded"),
    ):
        with pytest.raises(error, match=said):
            SlowWeights(**wrong)
    with pytest.raises(
        ValueError, match="the run has 4 steps, and the average would start after step 2 and take up none"
    ):
        train(tmp_path, [SlowWeights(every=3, warmup=0.5)], max_steps=4)
    for fine in (SlowWeights(every=2, warmup=0.5), SlowWeights(every=3)):  # what it says to do
        train(tmp_path, [fine], max_steps=4)
    frozen = nn.Linear(1, 1).requires_grad_(False)
    with pytest.raises(ValueError, match="SlowWeights: no parameter is trained"):
        SlowWeights().begin_task(FakeRun(frozen))


def test_a_second_attempt_starts_the_average_again():
    method = SlowWeights(decay=0.5)
    _, run = steps(method, [0.0, 8.0], max_steps=3)
    run.step = 0
    method.begin_task(run)  # auto_find_batch_size: the weights stay, the steps start over
    assert method.state_dict(run)["weight"].item() == 8.0
