"""MoFO: its selection by hand, AdamW at share 1, what may move, and resuming."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn

from hf_continual import ContinualConfig, ContinualTrainer, MoFO
from hf_continual.methods.mofo import MoFOOptimizer, kept_entries
from hf_continual.tensors.selection import kth_largest
from tests import toy

ZERO_TOLERANCE = 0.0


def example(world):
    return MoFO(share=0.2)


def zero(world):
    return MoFO(share=1.0)


def same_on_all(counts):
    """As if another process held no part of the tensor."""
    return counts.clone()


def test_the_selection_by_hand():
    m = torch.tensor([[3.0, -1.0, 0.5, -4.0], [0.0, 2.0, -2.0, 0.25]])
    for add_up in (None, same_on_all):
        (kept,) = kept_entries([m], 0.25, add_up=add_up)
        assert kept.tolist() == [[True, False, False, True], [False] * 4]
        (kept,) = kept_entries([m], 0.375, add_up=add_up)  # the third largest is tied: both move
        assert kept.tolist() == [[True, False, False, True], [False, True, True, False]]
        (kept,) = kept_entries([m], 1.0, add_up=add_up)
        assert kept.tolist() == [[True] * 4, [False, True, True, True]]  # a momentum of zero does not count
        (kept,) = kept_entries([torch.tensor([[1.0, float("nan")]])], 0.5, add_up=add_up)
        assert kept.tolist()[0][1]  # shows, as with AdamW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 7, 1000, 70_000])
def test_the_threshold_is_that_of_a_sort(count, dtype):
    g = torch.Generator().manual_seed(count)
    rows = (torch.randn(3, count, generator=g) * torch.rand(3, count, generator=g)).abs().to(dtype)
    rows[1, : count // 2] = rows[1, 0]  # equal values
    rows[2] = 0.0
    for k in {1, max(1, count // 7), count}:
        expected = rows.float().sort(dim=1, descending=True).values[:, k - 1]
        assert torch.equal(kth_largest(rows, k), expected)
        assert torch.equal(kth_largest(rows, k, add_up=lambda counts: counts), expected)


def matrix(seed=0, shape=(6, 8)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_one_step_by_hand():
    """m = 0.1 g, so the largest gradients choose; the first AdamW step moves by lr g / (|g| + eps), after decay."""
    weight = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    optimizer = MoFOOptimizer([weight], lr=0.5, weight_decay=0.1, eps=1e-8, share=0.5)
    weight.grad = torch.tensor([[0.1, -3.0], [2.0, 0.2]])
    optimizer.step()
    expected = torch.tensor([[1.0, 2.0 * 0.95 + 0.5], [3.0 * 0.95 - 0.5, 4.0]])
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], 0.1 * weight.grad, rtol=1e-6, atol=0)


def test_only_the_kept_move_and_they_move_as_adamw():
    """The moments are AdamW's on the same gradients, and vectors move in full."""
    plain = [nn.Parameter(matrix(i)) for i in range(3)] + [nn.Parameter(matrix(9, (5,)))]
    ours = copy.deepcopy(plain)
    adamw = torch.optim.AdamW(plain, lr=0.01, weight_decay=0.1, fused=True)
    mofo = MoFOOptimizer(ours, lr=0.01, weight_decay=0.1, share=0.25)
    for step in range(5):
        for i, (p, q) in enumerate(zip(plain, ours, strict=True)):
            p.grad = matrix(100 * step + i, p.shape)
            q.grad = p.grad.clone()
        before = [q.detach().clone() for q in ours]
        with torch.no_grad():
            for p, q in zip(plain, ours, strict=True):
                p.copy_(q)
        adamw.step()
        mofo.step()
        for p, q, old in zip(plain, ours, before, strict=True):
            assert torch.equal(adamw.state[p]["exp_avg"], mofo.state[q]["exp_avg"])
            assert torch.equal(adamw.state[p]["exp_avg_sq"], mofo.state[q]["exp_avg_sq"])
            moved = q.detach() != old
            assert moved.sum() == (12 if q.dim() == 2 else 5)
            assert torch.equal(q.detach(), torch.where(moved, p.detach(), old))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_share_1_is_adamw_bit_for_bit(dtype, weight_decay):
    plain = [nn.Parameter(matrix(i).to(dtype)) for i in range(3)]
    ours = copy.deepcopy(plain)
    adamw = torch.optim.AdamW(plain, lr=0.01, weight_decay=weight_decay, fused=True)
    mofo = MoFOOptimizer(ours, lr=0.01, weight_decay=weight_decay, share=1.0)
    for step in range(20):
        for i, (p, q) in enumerate(zip(plain, ours, strict=True)):
            p.grad = matrix(100 * step + i).to(dtype)
            q.grad = p.grad.clone()
        adamw.step()
        mofo.step()
    assert all(torch.equal(p, q) for p, q in zip(plain, ours, strict=True))


def test_its_state_is_adamws_and_resumes():
    ours = [nn.Parameter(matrix(i)) for i in range(2)]
    mofo = MoFOOptimizer([{"params": ours[:1], "share": 0.5}, {"params": ours[1:]}], lr=0.01, share=0.25)
    assert [g["share"] for g in mofo.param_groups] == [0.5, 0.25]

    def step(params, optimizer, i):
        for p in params:
            p.grad = matrix(50 + i)
        optimizer.step()

    for i in range(3):
        step(ours, mofo, i)
    again = copy.deepcopy(ours)
    resumed = MoFOOptimizer(again, lr=0.01)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        resumed.load_state_dict(mofo.state_dict())
    resumed = MoFOOptimizer([{"params": again[:1]}, {"params": again[1:]}], lr=0.01)
    resumed.load_state_dict(copy.deepcopy(mofo.state_dict()))
    for i in range(3, 6):
        step(ours, mofo, i)
        step(again, resumed, i)
    assert all(torch.equal(p, q) for p, q in zip(ours, again, strict=True))
    plain = torch.optim.AdamW([{"params": copy.deepcopy(ours)[:1]}, {"params": copy.deepcopy(ours)[1:]}], lr=0.01)
    plain.load_state_dict(mofo.state_dict())  # a run may go back to AdamW


def test_a_closure_and_no_gradient():
    weight, idle = nn.Parameter(matrix()), nn.Parameter(matrix(1))
    optimizer = MoFOOptimizer([weight, idle], lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss.detach()

    before = float(closure())
    assert float(optimizer.step(closure)) == before > float(closure())
    assert torch.equal(idle, matrix(1)) and idle not in optimizer.state


def train(folder, method, model=None, peft=None, **settings):
    trainer = ContinualTrainer(
        model or toy.model(), ContinualConfig(**toy.settings(folder, **settings)), train_dataset=toy.rows(),
        processing_class=toy.tokenizer(), peft_config=peft, methods=[method],
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    return trainer, {n: p.detach() != before[n] for n, p in trainer.model.named_parameters()}


def test_a_run_moves_its_share(tmp_path):
    _, moved = train(tmp_path, MoFO(share=0.1), max_steps=1, weight_decay=0.1)
    for name, change in moved.items():
        if "norm" in name:
            assert change.all()
        elif "embed" not in name:
            assert change.sum() == int(0.1 * change.numel()), name
    trainer, moved = train(tmp_path, MoFO(share=0.1), peft=LoraConfig(r=4, target_modules="all-linear"), max_steps=1)
    assert all(c.sum() == int(0.1 * c.numel()) for n, c in moved.items() if "lora_B" in n)
    assert not any(c.any() for n, c in moved.items() if "lora_A" in n)  # B = 0, so that A has no gradient yet
    assert type(trainer.run.optimizer) is MoFOOptimizer


def test_sentences(tmp_path):
    for share in (0, 1.5):
        with pytest.raises(ValueError, match=r"MoFO\(share=.*must lie between 0 and 1, 0 excluded"):
            MoFO(share=share)
    with pytest.raises(TypeError, match=r"MoFO\(share='a'\) must be a number"):
        MoFO(share="a")
    model = toy.model()
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name)
    with pytest.raises(ValueError, match="all 9 trained parameters are vectors"):
        train(tmp_path, MoFO(), model=model)
    with pytest.raises(ValueError, match=r"optim='adafactor' asks for another"):
        train(tmp_path, MoFO(), optim="adafactor")
