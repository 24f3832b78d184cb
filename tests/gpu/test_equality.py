"""Without methods ContinualTrainer is SFTTrainer to the last bit, on each device, in each precision."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from hf_continual import RecAdam, Replay
from hf_continual.methods.mofo import MoFOOptimizer
from hf_continual.methods.recadam import RecAdamOptimizer
from tests import toy
from tests.gpu import runs

LAYOUTS = {
    "padded": {},
    "packed": {"packing": True, "max_length": 32},
    "accumulated": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    "checkpointing": {"gradient_checkpointing": True},
}


def lora():
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)


def same(plain, ours):
    assert torch.equal(toy.flat(plain.model), toy.flat(ours.model))
    assert toy.logs(plain) == toy.logs(ours)


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bit_for_bit(tmp_path, device, layout, peft):
    same(*runs.pair(tmp_path, device, peft=lora() if peft else None, **LAYOUTS[layout]))


def test_bf16_autocast(tmp_path, device):
    plain, ours = runs.pair(
        tmp_path, device, precision="bf16", max_steps=6, rows=toy.rows(number=4), learning_rate=1e-2
    )
    same(plain, ours)
    assert all(p.dtype == torch.float32 for p in ours.model.parameters())
    losses = [e["loss"] for e in ours.state.log_history if "loss" in e]
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.gpu
def test_fp16_with_a_scaler(tmp_path, card):
    plain, ours = runs.pair(tmp_path, card, precision="fp16", max_steps=6)
    assert ours.accelerator.scaler is not None
    same(plain, ours)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "method", [lambda: RecAdam(anneal="none", pull=0.01), lambda: Replay(toy.rows(seed=9), ratio=0.3)]
)
def test_methods_under_a_scaler(tmp_path, card, method):
    ours = runs.trained(
        runs.ContinualTrainer,
        tmp_path,
        card,
        method(),
        precision="fp16",
        max_steps=8,
        rows=toy.rows(number=4),
        learning_rate=1e-2,
    )
    assert torch.isfinite(toy.flat(ours.model)).all()
    losses = [e["loss"] for e in ours.state.log_history if "loss" in e]
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_the_optimizer_that_was_asked_for(tmp_path, device, optim):
    plain, ours = runs.pair(tmp_path, device, optim=optim)
    same(plain, ours)
    assert bool(ours.optimizer.optimizer.defaults["fused"]) == (optim == "adamw_torch_fused")


def stepped(make, device, dtype):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, device=device).to(dtype)) for s in ((64, 32), (32,))]
    optimizer = make(params)
    for i in range(4):
        for p in params:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(device, dtype)
        optimizer.step()
    return torch.cat([p.detach().float().cpu().flatten() for p in params])


@pytest.mark.parametrize("path", ["fused", "foreach"])
def test_optimizers_at_zero_strength_are_adamw(device, path):
    how = {"lr": 1e-2, "weight_decay": 0.0}
    adam = stepped(lambda p: torch.optim.AdamW(p, **how, **{path: True}), device, torch.float32)
    mofo = stepped(lambda p: MoFOOptimizer(p, share=1.0, **how), device, torch.float32)
    recadam = stepped(lambda p: RecAdamOptimizer(p, anneal_w=0.0, **how), device, torch.float32)
    torch.testing.assert_close(mofo, adam, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(recadam, adam, rtol=1e-4, atol=1e-4)  # its eps is outside the bias correction
