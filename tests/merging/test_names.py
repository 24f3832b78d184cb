"""Names in a model's files against names in the loaded model: adapters, embeddings and heads are found by what is loaded."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
    set_seed,
)

from hf_continual import interpolate, merge_linear
from tests.merging.world import build, save, tensors

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*embedding layers:UserWarning", "ignore:.*fan_in_fan_out:UserWarning", "ignore:.*tie:UserWarning"
)
TEXT = dict(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=1,
)  # fmt: skip
SEEING = {
    "llava": lambda vocab: LlavaConfig(
        text_config=LlamaConfig(**{**TEXT, "vocab_size": vocab}),
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        ),
        image_token_index=39,
    ),
    "qwen2.5": lambda vocab: Qwen2_5_VLConfig(
        text_config={
            **TEXT, "vocab_size": vocab,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config=dict(
            depth=2, hidden_size=16, out_hidden_size=16, intermediate_size=24, num_heads=2, fullatt_block_indexes=[1]
        ),
        image_token_id=39, video_token_id=38, vision_start_token_id=37, vision_end_token_id=36,
    ),
}  # fmt: skip


def seeing(kind, seed, vocab=40):
    set_seed(seed)
    return AutoModelForImageTextToText.from_config(SEEING[kind](vocab)).eval()


def said(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(2, 14)[None]).logits


def adapt(folder, to, seed, **settings):
    torch.manual_seed(seed)
    peft = get_peft_model(
        AutoModelForImageTextToText.from_pretrained(folder), LoraConfig(r=2, init_lora_weights=False, **settings)
    )
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    peft.save_pretrained(to)
    return to


@pytest.mark.parametrize("settings", [
    {"target_modules": r".*language_model.*\.(q_proj|down_proj)"},
    {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["k_proj", "embed_tokens"]},
])  # fmt: skip
@pytest.mark.parametrize("kind", SEEING)
def test_an_adapter_on_a_model_whose_files_have_other_names(tmp_path, kind, settings):
    seeing(kind, 0).save_pretrained(tmp_path / "base")
    adapt(tmp_path / "base", tmp_path / "a", 1, **settings)
    load = AutoModelForImageTextToText.from_pretrained
    want = said(PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "a"))
    interpolate(tmp_path / "base", tmp_path / "a", tmp_path / "out", alpha=1.0, output="model")
    assert tensors(tmp_path / "out").keys() - {"lm_head.weight"} == tensors(tmp_path / "base").keys() - {
        "lm_head.weight"
    }
    assert torch.allclose(said(load(tmp_path / "out")), want, atol=1e-5)


def test_adapters_of_such_a_model_stay_adapters(tmp_path):
    seeing("llava", 0).save_pretrained(tmp_path / "base")
    for seed, name in ((1, "a"), (2, "b")):
        adapt(tmp_path / "base", tmp_path / name, seed, target_modules=r".*language_model.*q_proj")
    merge_linear([tmp_path / "a", tmp_path / "b"], tmp_path / "out", base=tmp_path / "base", output="adapter")
    merge_linear([tmp_path / "a", tmp_path / "b"], tmp_path / "full", base=tmp_path / "base", output="model")
    load = AutoModelForImageTextToText.from_pretrained
    put = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "out")
    assert torch.allclose(said(put), said(load(tmp_path / "full")), atol=1e-5)


def test_files_without_the_prefix_of_the_inner_model(tmp_path):
    base = build("gpt2")
    save(base, tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    save_file(
        {k.removeprefix("transformer."): v for k, v in stored.items()},
        tmp_path / "base" / "model.safetensors",
        {"format": "pt"},
    )
    set_seed(1)
    peft = get_peft_model(
        base, LoraConfig(r=2, init_lora_weights=False, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    want = said(peft)
    peft.save_pretrained(tmp_path / "a")
    interpolate(tmp_path / "base", tmp_path / "a", tmp_path / "out", alpha=1.0, output="model")
    assert torch.allclose(said(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), want, atol=1e-5)
