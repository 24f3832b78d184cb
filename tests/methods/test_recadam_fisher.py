"""RecAdam with the diagonal Fisher information in its quadratic term, as the paper derives it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from hf_continual import EWC, ContinualConfig, ContinualTrainer, RecAdam
from hf_continual.methods.recadam import RecAdamOptimizer
from hf_continual.methods.recadam.recall import over_mean
from tests import toy

PULL = {"anneal": "none", "pull": 0.02}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_share_of_each_weight_is_min_1_r_f(dtype):
    """One update by hand: Adam's new weight, then min(1, r F) of the way to the anchor."""
    start, grad = torch.tensor([1.0, -2.0, 3.0, 0.5]), torch.tensor([0.3, -0.1, 0.2, 0.4])
    weights = [torch.nn.Parameter(start.to(dtype, copy=True)) for _ in range(2)]
    fisher = torch.tensor([0.0, 0.5, 1.0, 100.0])
    for p, strength in zip(weights, (0.0, 1.0), strict=True):
        p.grad = grad.to(dtype)
        optimizer = RecAdamOptimizer([p], lr=0.1, anneal="none", anchor_strength=strength)
        optimizer.state[p]["anchor"] = torch.zeros(4, dtype=dtype)
        optimizer.state[p]["fisher"] = fisher
        optimizer.step()
    adam, pulled = weights
    expected = adam.detach().float() * torch.tensor([1.0, 0.95, 0.9, 0.0])
    torch.testing.assert_close(
        pulled.detach().float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0
    )


def test_over_its_mean_and_a_constant_is_exactly_one():
    for count, value in ((7, 0.1), (1000, 3e-9), (33, 12345.678)):
        found = over_mean({"a": torch.full((count,), value), "b": torch.full((3, 5), value)})
        assert all((t == 1).all() for t in found.values())
    found = over_mean({"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([0.0])})
    assert found["a"].tolist() == [0.5, 2.5] and found["b"].tolist() == [0.0]
    with pytest.raises(ValueError, match="the mean of the Fisher information is 0"):
        over_mean({"a": torch.zeros(3)})


def build(folder, method, start=None, **settings):
    return ContinualTrainer(
        start or toy.model(), ContinualConfig(**toy.settings(folder, **settings)), train_dataset=toy.rows(),
        processing_class=toy.tokenizer(), methods=[method],
    )  # fmt: skip


def test_a_constant_one_is_todays_recadam_bit_for_bit(tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        names = {n: torch.full(p.shape, 0.3) for n, p in toy.model().named_parameters()}
        save_file({f"fisher/{n}": t for n, t in names.items()}, tmp_path / "constant.safetensors")
        found = []
        for more in ({}, {"fisher": str(tmp_path / "constant.safetensors")}):
            trainer = build(tmp_path, RecAdam(**PULL, **more), toy.model().to(dtype))
            trainer.train()
            found.append(toy.flat(trainer.model))
        assert torch.equal(*found)


def test_rows_are_measured_once_at_the_start_and_kept(tmp_path):
    """F is EWC's of the same rows at the same weights; a resumed run does not measure again."""
    old = toy.rows(seed=9, low=30, high=59)
    settings = {"save_strategy": "steps", "save_steps": 2}
    method = RecAdam(**PULL, fisher=old, fisher_rows=20)
    trainer = build(tmp_path, method, **settings)
    measured = []
    begin = method.begin_task

    def noted(run):
        begin(run)
        state = run.optimizer.state
        measured.append({n: state[p]["fisher"].clone() for n, p in run.named_parameters().items()})

    method.begin_task = noted
    trainer.train()
    other = ContinualTrainer(
        toy.model(), ContinualConfig(**toy.settings(tmp_path / "ewc", max_steps=1, learning_rate=0.0)), train_dataset=old,
        processing_class=toy.tokenizer(), methods=[EWC(rows=20)],
    )  # fmt: skip
    other.train()
    fisher = {n: other.task_states["ewc"][f"fisher/{n}"] for n in measured[0]}
    for name, expected in over_mean(fisher).items():
        torch.testing.assert_close(measured[0][name], expected, rtol=1e-4, atol=1e-6)
    calls = []
    resumed = build(tmp_path, RecAdam(**PULL, fisher=old, fisher_rows=20), **settings)
    run_gradients = type(resumed.run).gradients
    resumed.run.gradients = lambda *a, **k: (calls.append(1), run_gradients(resumed.run, *a, **k))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not calls and torch.equal(toy.flat(trainer.model), toy.flat(resumed.model))
    with pytest.raises(ValueError, match="the rows are not those"):
        build(tmp_path, RecAdam(**PULL, fisher=toy.rows(seed=10), fisher_rows=20), **settings).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


def test_important_weights_stay_nearer(tmp_path):
    """Weights of the upper half of F move less than with one fraction for all, those of the lower half more."""
    start = toy.flat(toy.model())
    found, halves = [], None
    for fisher in (None, toy.rows(seed=9, low=30, high=59)):
        method = RecAdam(anneal="none", pull=0.2, fisher=fisher)
        trainer = build(tmp_path, method, max_steps=10)
        trainer.train()
        found.append((toy.flat(trainer.model) - start).abs())
        if fisher is not None:
            state = trainer.run.optimizer.state
            halves = torch.cat([state[p]["fisher"].flatten() for p in trainer.run.named_parameters().values()]) > 1
    scalar, weighed = found
    assert weighed[halves].mean() < scalar[halves].mean() and weighed[~halves].mean() > scalar[~halves].mean()


def test_sentences(tmp_path):
    with pytest.raises(ValueError, match="Use pull_every=1"):
        RecAdam(**PULL, pull_every=2, fisher=[{"text": "a"}])
    with pytest.raises(ValueError, match="must be one of batch, sample"):
        RecAdam(**PULL, fisher_kind="exact")
    with pytest.raises(ValueError, match="must be at least 1"):
        RecAdam(**PULL, fisher_rows=0)
    with pytest.raises(FileNotFoundError, match="gone.jsonl"):
        RecAdam(**PULL, fisher="gone.jsonl")
    with pytest.raises(FileNotFoundError, match="EWC leaves one as continual/ewc.safetensors"):
        build(tmp_path, RecAdam(**PULL, fisher="gone.safetensors")).train()
    (tmp_path / "cut.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot be read"):
        build(tmp_path, RecAdam(**PULL, fisher=str(tmp_path / "cut.safetensors"))).train()
    save_file({"fisher/lm_head.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match=r"does not belong to this model: \d+ weights differ, such as .*: nothing there"
    ):
        build(tmp_path, RecAdam(**PULL, fisher=str(tmp_path / "other.safetensors"))).train()
