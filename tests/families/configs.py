"""Tiny random models of many families: the rows of the families table.

Each entry is a model type of transformers with the changes that make its configuration tiny. If a family mixes
kinds of layers (attention and state space, dense and experts), the tiny model holds both kinds.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoModelForSeq2SeqLM, set_seed

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
HEADED = {**GROUPED, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
          "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}  # fmt: skip
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
         "layer_types": ["linear_attention", "full_attention", "linear_attention"]}  # fmt: skip

TEXT: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": HEADED,
    "gemma": HEADED,
    "gemma2": HEADED,
    "gemma3_text": HEADED,
    "gemma3n_text": {
        **HEADED, "intermediate_size": [48] * 3, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64,
        "laurel_rank": 8, "altup_num_inputs": 2, "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "activation_sparsity_pattern": [0.0] * 3,
    },
    "gemma4_text": {**HEADED, "layer_types": ["sliding_attention", "full_attention", "full_attention"], "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 0, "global_head_dim": 8},
    "phi": {},
    "phi3": GROUPED,
    "gpt2": {"n_inner": 48, "tie_word_embeddings": True},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 4},
    "gpt_bigcode": {"n_inner": 48},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]], "num_layers": 3, "num_heads": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "bloom": {"n_layer": 3, "n_head": 4},
    "falcon": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64},
    "stablelm": GROUPED,
    "starcoder2": GROUPED,
    "granite": {**GROUPED, "logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "cohere": {**GROUPED, "logit_scale": 0.25},
    "cohere2": {**HEADED, "logit_scale": 0.25},
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "olmo3": GROUPED,
    "glm4": {**HEADED},
    "smollm3": GROUPED,
    "ernie4_5": HEADED,
    "exaone4": HEADED,
    "seed_oss": HEADED,
    "helium": HEADED,
    "arcee": GROUPED,
    "apertus": GROUPED,
    "nemotron": GROUPED,
    "hunyuan_v1_dense": HEADED,
    "nanochat": GROUPED,
    "modernbert-decoder": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "local_attention": 16},
    "llama4_text": {**HEADED, "num_local_experts": 2, "intermediate_size_mlp": 48, "moe_layers": [1]},
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "qwen2_moe": {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**HEADED, **EXPERTS},
    "gpt_oss": {**HEADED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 4.0},
    "olmoe": {**GROUPED, **EXPERTS},
    "phimoe": {**GROUPED, "num_local_experts": 4},
    "deepseek_v2": {**LATENT, **ROUTED},
    "deepseek_v3": {**LATENT, **ROUTED},
    "glm4_moe": {**HEADED, **ROUTED},
    "ernie4_5_moe": {**GROUPED, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1},
    "minimax": {**HEADED, "num_local_experts": 4, "layer_types": ["linear_attention", "full_attention", "linear_attention"], "block_size": 16},
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16},
    "falcon_mamba": {"state_size": 4, "time_step_rank": 4},
    "jamba": {**GROUPED, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "bamba": {**GROUPED, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 16},
    "zamba2": {**GROUPED, "num_key_value_heads": 4, "mamba_d_state": 8, "n_mamba_heads": 8, "mamba_ngroups": 1, "layers_block_type": ["mamba", "hybrid", "mamba"], "layer_types": ["mamba", "hybrid", "mamba"], "num_mem_blocks": 1, "adapter_rank": 4, "chunk_size": 16, "use_mem_eff_path": False},
    "falcon_h1": {**HEADED, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16},
    "granitemoehybrid": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48, "layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16},
    "nemotron_h": {**HEADED, "layers_block_type": ["mamba", "attention", "mlp"], "hybrid_override_pattern": "M*-", "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 16},
    "qwen3_next": {**HEADED, **EXPERTS, **DELTA, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": {**HEADED, **DELTA},
    "lfm2": {**GROUPED, "layer_types": ["conv", "full_attention", "conv"], "block_ff_dim": 48, "conv_L_cache": 3},
    "recurrent_gemma": {**GROUPED, "num_key_value_heads": 4, "lru_width": 32, "attention_window_size": 32},
    "rwkv": {},
}  # fmt: skip


CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}
QWEN = {
    "depth": 2, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
QWEN_IDS = {"image_token_id": 63, "video_token_id": 62, "vision_start_token_id": 61, "vision_end_token_id": 60}
GLM_IDS = {
    "image_token_id": 63, "video_token_id": 62, "image_start_token_id": 61, "image_end_token_id": 60,
    "video_start_token_id": 59, "video_end_token_id": 58,
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}


def _of(kind: str, **changes: Any) -> dict[str, Any]:
    return {**SMALL, **GROUPED, "model_type": kind, **changes}


# Models with a vision or audio tower, trained on text alone.
TOWERS: dict[str, dict[str, Any]] = {
    "llava": {"text_config": _of("llama"), "vision_config": {**CLIP, "model_type": "clip_vision_model"}, "image_token_id": 63, "vision_feature_layer": -1},
    "llava_onevision": {"text_config": _of("qwen2"), "vision_config": SIGLIP, "image_token_index": 63, "video_token_index": 62},
    "qwen2_vl": {"text_config": {**SMALL, **GROUPED, **ROPE}, "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}, **QWEN_IDS},
    "qwen2_5_vl": {"text_config": {**SMALL, **GROUPED, **ROPE}, "vision_config": {**QWEN, "window_size": 16, "fullatt_block_indexes": [1]}, **QWEN_IDS},
    "qwen3_vl": {"text_config": {**SMALL, **HEADED, **ROPE}, "vision_config": {**QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, **QWEN_IDS},
    "qwen3_5": {"text_config": {**SMALL, **HEADED, **DELTA}, "vision_config": {**QWEN, "num_position_embeddings": 16}, **QWEN_IDS},
    "gemma3": {"text_config": {**SMALL, **HEADED}, "vision_config": {**CLIP, "vision_use_head": False}, "mm_tokens_per_image": 1, "image_token_index": 63, "boi_token_index": 62, "eoi_token_index": 61},
    "paligemma": {"text_config": _of("gemma", head_dim=8), "vision_config": {**SIGLIP, "projection_dim": 32}, "projection_dim": 32, "image_token_index": 63},
    "smolvlm": {"text_config": _of("llama"), "vision_config": CLIP, "image_token_id": 63, "scale_factor": 2},
    "idefics3": {"text_config": _of("llama"), "vision_config": CLIP, "image_token_id": 63, "scale_factor": 2},
    "internvl": {"text_config": _of("qwen2"), "vision_config": {**CLIP, "image_size": [8, 8], "patch_size": [4, 4]}, "image_token_id": 63},
    "mistral3": {"text_config": _of("mistral", head_dim=8), "vision_config": {**CLIP, "model_type": "pixtral"}, "image_token_index": 63},
    "mllama": {"text_config": {**SMALL, **GROUPED, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2, "image_size": 8, "patch_size": 4, "vision_output_dim": 32, "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1}, "image_token_index": 63},
    "glm4v": {"text_config": {**SMALL, **GROUPED, **ROPE}, "vision_config": {**QWEN, "image_size": 8}, **GLM_IDS},
    "aya_vision": {"text_config": _of("cohere2", head_dim=8), "vision_config": SIGLIP, "image_token_index": 63},
    "lfm2_vl": {"text_config": _of("lfm2", layer_types=["conv", "full_attention", "conv"], block_ff_dim=48), "vision_config": {**CLIP, "model_type": "siglip2_vision_model", "num_patches": 16}, "image_token_id": 63},
    "llama4": {"text_config": {**SMALL, **HEADED, "num_local_experts": 2, "intermediate_size_mlp": 48, "moe_layers": [1], "interleave_moe_layer_step": 2}, "vision_config": {**CLIP, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}, "image_token_index": 63},
    "qwen2_audio": {"text_config": _of("qwen2"), "audio_config": {"num_mel_bins": 8, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 16, "max_source_positions": 16}, "audio_token_index": 63},
}  # fmt: skip

# Models with an encoder, which are refused.
ENCODERS: dict[str, dict[str, Any]] = {
    "t5": {"vocab_size": 64, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "decoder_start_token_id": 0},
    "bart": {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64},
}  # fmt: skip

KINDS = (*TEXT, *TOWERS, *ENCODERS)

# What runs between the ids and the first block, if it is not one module `embed_tokens` next to the blocks.
EMBEDDINGS: dict[str, list[str]] = {
    "gemma3n_text": ["embed_tokens", "embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm", "altup_projections.0"],
    "gemma4_text": ["embed_tokens", "embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm"],
    "gpt2": ["wte", "wpe"],
    "gpt_neo": ["wte", "wpe"],
    "gpt_bigcode": ["wte", "wpe"],
    "gptj": ["wte"],
    "mpt": ["wte"],
    "gpt_neox": ["embed_in"],
    "opt": ["embed_tokens", "embed_positions", "project_in"],
    "bloom": ["word_embeddings", "word_embeddings_layernorm"],
    "falcon": ["word_embeddings"],
    "mamba": ["embeddings"],
    "mamba2": ["embeddings"],
    "falcon_mamba": ["embeddings"],
    "nemotron_h": ["embeddings"],
    "rwkv": ["embeddings"],
    "modernbert-decoder": ["embeddings"],
}  # fmt: skip


def config(kind: str) -> Any:
    """The tiny configuration of a family, without dropout: two passes over the same rows must agree."""
    changes = {**SMALL, **TEXT[kind]} if kind in TEXT else {**TOWERS, **ENCODERS}[kind]
    made = AutoConfig.for_model(kind, **changes)
    for part in {id(c): c for c in (made, made.get_text_config())}.values():
        for name, value in vars(part).items():
            if isinstance(value, float) and ("drop" in name or "pdrop" in name):
                setattr(part, name, 0.0)
    return made


def build(kind: str, seed: int = 0) -> nn.Module:
    """A tiny random model of a family, in fp32."""
    set_seed(seed)
    auto: Any = AutoModelForCausalLM
    if kind in TOWERS or kind in ENCODERS:
        auto = AutoModelForMultimodalLM if kind in TOWERS else AutoModelForSeq2SeqLM
    return auto.from_config(config(kind))
