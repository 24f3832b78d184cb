"""SLAO: its formulas by hand, three tasks on disk against them, resumed, new adapters, and a 4-bit base."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from hf_continual import SLAO, ContinualConfig, ContinualTrainer
from hf_continual.methods.slao import merged, orthonormal
from tests import toy

ZERO_TOLERANCE = 0.0
ADAPTERS_ONLY = True
NEEDS_PREDECESSOR = True
CONTINUES = True


def example(world):
    return SLAO()


def zero(world):
    return SLAO(power=0.0, orthogonal=False)


def test_the_merge_by_hand():
    B, task = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 2.0]])
    torch.testing.assert_close(merged(B, task, 4), torch.tensor([[2.0, 0.0]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(merged(B, task, 2, power=2.0), torch.tensor([[1.5, -1.0]]), rtol=0, atol=1e-6)
    assert torch.equal(merged(B, task, 1), task) and torch.equal(merged(B * 1e9, task, 7, power=0.0), task)
    # With power 1 it is the mean of all tasks.
    tasks, mean = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 2)
    for i, each in enumerate(tasks, 1):
        mean = merged(mean, each, i, power=1.0)
    torch.testing.assert_close(mean, tasks.mean(0), rtol=0, atol=1e-6)


def test_the_basis_by_hand():
    """Gram-Schmidt of the rows (3, 4, 0) and (3, 4, 2)."""
    found = orthonormal(torch.tensor([[3.0, 4.0, 0.0], [3.0, 4.0, 2.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]), rtol=0, atol=1e-6)
    A = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    Q = orthonormal(A)
    torch.testing.assert_close(Q @ Q.T, torch.eye(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(A @ Q.T @ Q, A, rtol=0, atol=1e-5)  # the same rows are spanned
    torch.testing.assert_close(orthonormal(Q), Q, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"9 rows of A with 4 columns cannot be orthonormal. Give a rank of at most 4"):
        orthonormal(A.T)


def lora(rank=2):
    return LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")


def train(start, folder, method, peft=None, seed=1, resume=None, **settings):
    given = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, **settings}
    trainer = ContinualTrainer(
        start, ContinualConfig(**toy.settings(folder, **given)), train_dataset=toy.rows(seed=seed),
        processing_class=toy.tokenizer(), peft_config=peft, methods=[method],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer


def factors(folder):
    found = load_file(folder / "adapter_model.safetensors")
    return {n: t for n, t in found.items() if "lora_A" in n}, {n: t for n, t in found.items() if "lora_B" in n}


def test_three_tasks_are_the_formulas(tmp_path):
    """A learning rate of 0 shows where a task starts; the last checkpoint holds what it trained."""
    toy.model().save_pretrained(tmp_path / "base")
    train(str(tmp_path / "base"), tmp_path / "0", SLAO(), lora())
    for task in (1, 2):
        left, trained = tmp_path / str(task - 1), tmp_path / str(task - 1) / "checkpoint-3"
        train(str(left), tmp_path / f"idle{task}", SLAO(), learning_rate=0.0, max_steps=1)
        A, B = factors(tmp_path / f"idle{task}" / "checkpoint-1")
        before_A, before_B = factors(trained)
        for name, start in A.items():
            torch.testing.assert_close(start, orthonormal(before_A[name]), rtol=0, atol=1e-6)
        assert all(torch.equal(start, before_B[name]) for name, start in B.items())  # as trained, not merged
        train(str(left), tmp_path / str(task), SLAO(), seed=task + 1)
        (A, B), (_, merged_B) = factors(tmp_path / str(task) / "checkpoint-3"), factors(left)
        got_A, got_B = factors(tmp_path / str(task))
        assert all(torch.equal(got_A[name], trained) for name, trained in A.items())
        for name, trained in B.items():
            expected = merged_B[name] + (trained - merged_B[name]) / (task + 1) ** 0.5
            torch.testing.assert_close(got_B[name], expected, rtol=0, atol=1e-6)
            assert (got_B[name] - trained).abs().max() > 1e-5
        one, two = (factors(tmp_path / str(i)) for i in (0, task))
        assert {n: t.shape for n, t in one[0].items()} == {n: t.shape for n, t in two[0].items()}  # no growth


def test_the_last_checkpoint_merges_again(tmp_path):
    toy.model().save_pretrained(tmp_path / "base")
    train(str(tmp_path / "base"), tmp_path / "0", SLAO(), lora())
    straight = train(str(tmp_path / "0"), tmp_path / "1", SLAO())
    result = toy.flat(straight.model)
    for step in (1, 3):
        resumed = train(str(tmp_path / "0"), tmp_path / "1", SLAO(), resume=str(tmp_path / "1" / f"checkpoint-{step}"))
        assert torch.equal(result, toy.flat(resumed.model))


def test_a_new_adapter_is_a_first_task(tmp_path, caplog):
    toy.model().save_pretrained(tmp_path / "base")
    train(str(tmp_path / "base"), tmp_path / "0", SLAO(), lora())
    with caplog.at_level(logging.WARNING):
        stacked = train(str(tmp_path / "0"), tmp_path / "1", SLAO(), lora())
    assert "this task has a new adapter, so nothing is merged with that of the 1 tasks before" in caplog.text
    assert stacked.task_states["slao"]["tasks"] == 1
    plain = train(str(tmp_path / "0"), tmp_path / "plain", SLAO(power=0.0, orthogonal=False), lora())
    assert torch.equal(toy.flat(stacked.model), toy.flat(plain.model))


def test_sentences(tmp_path):
    with pytest.raises(ValueError, match="power=-1.*must be a finite number of at least 0"):
        SLAO(power=-1)
    with pytest.raises(TypeError, match="power='a'.*must be a number"):
        SLAO(power="a")
    with pytest.raises(ValueError, match="SLAO merges LoRA adapters, but the model is a LlamaForCausalLM without one"):
        train(toy.model(), tmp_path, SLAO())
    toy.model().save_pretrained(tmp_path / "base")
    wide = LoraConfig(r=40, target_modules=["q_proj"], task_type="CAUSAL_LM")
    train(str(tmp_path / "base"), tmp_path / "0", SLAO(), wide)
    with pytest.raises(ValueError, match=r"40 rows of A with 32 columns .* or SLAO\(orthogonal=False\)"):
        train(str(tmp_path / "0"), tmp_path / "1", SLAO())
    train(str(tmp_path / "0"), tmp_path / "1", SLAO(orthogonal=False))  # what it says to do
