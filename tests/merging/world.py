"""Tiny models and adapters on disk: four families, tied and untied, one file or several."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2Config,
    set_seed,
)

from tests import toy
from tests.merging.bytes_of import digest as digest

COMMON = dict(vocab_size=len(toy.VOCABULARY), pad_token_id=0, eos_token_id=1, bos_token_id=1)
LLAMA = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, **COMMON,
)  # fmt: skip
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": lambda **c: LlamaConfig(**{**LLAMA, "tie_word_embeddings": False, **c}),
    "llama tied": lambda **c: LlamaConfig(**{**LLAMA, "tie_word_embeddings": True, **c}),
    "qwen": lambda **c: Qwen2Config(**{**LLAMA, "tie_word_embeddings": True, **c}),
    "gemma": lambda **c: Gemma2Config(**{**LLAMA, "head_dim": 8, **c}),
    "gpt2": lambda **c: GPT2Config(**{**COMMON, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, **c}),
    "mixtral": lambda **c: MixtralConfig(**{**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, **c}),
}


def cells(*axes: Any) -> list[Any]:
    """Every combination for `make test-all`; for `make test` a few that contain each value."""
    axes = tuple(list(axis) for axis in axes)
    few = {
        tuple(axis[(i + k * (i // len(axis))) % len(axis)] for k, axis in enumerate(axes))
        for i in range(max(map(len, axes)))
    }
    return [pytest.param(*c, marks=[] if c in few else pytest.mark.exhaustive) for c in itertools.product(*axes)]


def build(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    """A model with random weights, norms and biases included."""
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.to(dtype)


def tuned(model: PreTrainedModel, seed: int, size: float = 0.01) -> PreTrainedModel:
    """A copy whose weights all changed a little."""
    moved = AutoModelForCausalLM.from_config(model.config).to(model.dtype)
    moved.load_state_dict(model.state_dict())
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_((size * torch.randn(parameter.shape)).to(parameter.dtype))
    return moved


def save(model: Any, folder: Path, **options: Any) -> Path:
    """Save model and tokenizer."""
    model.save_pretrained(folder, **options)
    toy.tokenizer().save_pretrained(folder)
    return folder


def family(
    tmp: Path, name: str = "llama", number: int = 2, dtype: torch.dtype = torch.float32, **config: Any
) -> list[Path]:
    """A base and tuned copies of it, saved."""
    base = build(name, dtype=dtype, **config)
    folders = [save(base, tmp / "base")]
    return folders + [save(tuned(base, seed), tmp / f"m{seed}") for seed in range(1, number + 1)]


def adapter(base: PreTrainedModel, folder: Path, seed: int, **config: Any) -> Path:
    """A LoRA adapter on a copy of the base, all of its parts random, saved."""
    copy = AutoModelForCausalLM.from_config(base.config).to(base.dtype)
    copy.load_state_dict(base.state_dict())
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **config}
    torch.manual_seed(seed)
    model = get_peft_model(copy, LoraConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    """A model's logits for some ids."""
    ids = torch.arange(4, 24).reshape(2, 10)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    from safetensors.torch import load_file

    return {n: t for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}
