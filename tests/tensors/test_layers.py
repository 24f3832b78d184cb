"""Blocks and embeddings are found by structure on every architecture family."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_continual.tensors.layers import embedding_modules, find_blocks, is_tied

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_hidden_layers": 12,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
# architecture -> (changes of the configuration, path of the blocks, embeddings)
FAMILIES = {
    "llama": ({"num_key_value_heads": 2}, "model.layers", ["model.embed_tokens"]),
    "mistral": ({"num_key_value_heads": 2}, "model.layers", ["model.embed_tokens"]),
    "qwen2": ({"num_key_value_heads": 2}, "model.layers", ["model.embed_tokens"]),
    "qwen3": ({"num_key_value_heads": 2, "head_dim": 8}, "model.layers", ["model.embed_tokens"]),
    "gemma": ({"num_key_value_heads": 2, "head_dim": 8}, "model.layers", ["model.embed_tokens"]),
    "gemma2": ({"num_key_value_heads": 2, "head_dim": 8}, "model.layers", ["model.embed_tokens"]),
    "gemma3_text": ({"num_key_value_heads": 2, "head_dim": 8}, "model.layers", ["model.embed_tokens"]),
    "gpt_neox": ({}, "gpt_neox.layers", ["gpt_neox.embed_in"]),
    "gpt2": ({"n_inner": 32}, "transformer.h", ["transformer.wte", "transformer.wpe"]),
    "phi": ({}, "model.layers", ["model.embed_tokens"]),
    "phi3": ({"pad_token_id": 0}, "model.layers", ["model.embed_tokens"]),
    "mixtral": ({"num_key_value_heads": 2, "num_local_experts": 4}, "model.layers", ["model.embed_tokens"]),
    "qwen2_moe": ({"num_key_value_heads": 2, "shared_expert_intermediate_size": 8, **EXPERTS}, "model.layers", ["model.embed_tokens"]),
    "opt": ({"ffn_dim": 32, "word_embed_proj_dim": 16}, "model.decoder.layers", ["model.decoder.embed_tokens", "model.decoder.embed_positions"]),
    "bloom": ({}, "transformer.h", ["transformer.word_embeddings", "transformer.word_embeddings_layernorm"]),
    "falcon": ({}, "transformer.h", ["transformer.word_embeddings"]),
}  # fmt: skip


def build(kind):
    changes, *_ = FAMILIES[kind]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **changes}))


@pytest.mark.parametrize("kind", FAMILIES)
def test_families(kind):
    _, path, embeddings = FAMILIES[kind]
    model = build(kind)
    blocks = find_blocks(model)
    assert blocks.path == path and len(blocks) == 12
    assert [model.get_submodule(f"{path}.{i}") for i in range(12)] == list(blocks.modules)
    assert sorted(embedding_modules(model)) == sorted(embeddings)
    assert not any(
        isinstance(m, nn.Linear) and m is model.get_output_embeddings() for m in embedding_modules(model).values()
    )


def test_projections_into_the_stack_belong_to_the_embeddings():
    changes = {"ffn_dim": 32, "word_embed_proj_dim": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **{**SMALL, **changes}))
    assert "model.decoder.project_in" in embedding_modules(model)
    assert "model.decoder.project_out" not in embedding_modules(model)


def test_a_vision_tower_is_passed_over():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision_tower = nn.ModuleList([nn.Linear(50, 50) for _ in range(6)])
            self.text = nn.Module()
            self.text.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    assert find_blocks(Both()).path == "text.layers"


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="Linear has no list of blocks"):
        find_blocks(nn.Linear(2, 2))


def test_tied():
    assert is_tied(build("gpt2")) and not is_tied(build("llama"))
