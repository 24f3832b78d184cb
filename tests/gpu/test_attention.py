"""Packed rows do not see each other, with the attention that the device has; QLoRA with real kernels."""

from __future__ import annotations

from importlib import util

import pytest
import torch
from peft import LoraConfig

from hf_continual import ContinualTrainer
from tests import toy
from tests.gpu import runs


def loss_of(folder, device, layout, **given):
    """The first step's loss over the same eight rows."""
    torch.use_deterministic_algorithms(False)
    rows = toy.rows(number=8)
    trainer = runs.trained(
        ContinualTrainer,
        folder,
        device,
        rows=rows,
        max_steps=1,
        per_device_train_batch_size=8,
        learning_rate=0.0,
        **layout,
        **given,
    )
    return next(e["loss"] for e in trainer.state.log_history if "loss" in e)


@pytest.mark.filterwarnings("ignore")
def test_packed_rows_have_the_loss_of_padded_ones(tmp_path, device):
    padded = loss_of(tmp_path / "a", device, {})
    packed = loss_of(tmp_path / "b", device, {"packing": True, "max_length": 128})
    assert packed == pytest.approx(padded, rel=2e-4)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_flash_attention(tmp_path, card):
    if util.find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed")
    config = {"attn_implementation": "flash_attention_2", "dtype": torch.bfloat16}
    packed = loss_of(tmp_path / "b", card, {"packing": True, "max_length": 128}, config=config, precision="bf16")
    padded = loss_of(tmp_path / "a", card, {}, precision="bf16")
    assert packed == pytest.approx(padded, rel=2e-2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_qlora(tmp_path, device):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.use_deterministic_algorithms(False)
    toy.model(hidden_size=128, intermediate_size=128, num_key_value_heads=4).save_pretrained(tmp_path / "wide")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", quantization_config=how, device_map=device)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    precision = "bf16" if device == "cuda" else "fp32"
    trainer = runs.trained(
        ContinualTrainer, tmp_path / "out", device, *_methods(), model=model, peft=lora, precision=precision,
        max_steps=12, learning_rate=1e-2, optim="adamw_torch",
    )  # fmt: skip
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert losses[-1] < losses[0] - 0.1
    assert any(type(m).__name__ == "Linear4bit" for m in trainer.model.modules())


def _methods():
    from hf_continual import RecAdam, Replay

    return [Replay(toy.rows(seed=9), ratio=0.3), RecAdam(anneal="none", pull=0.01)]
