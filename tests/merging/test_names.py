"""Names in a model's files against names in the loaded model: adapters, embeddings and heads are found by the loaded names."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BloomConfig,
    CLIPVisionConfig,
    FalconConfig,
    GPTNeoXConfig,
    LlamaConfig,
    LlavaConfig,
    MambaConfig,
    OPTConfig,
    PhiConfig,
    Qwen2_5_VLConfig,
    set_seed,
)

from hf_continual import interpolate, merge_linear
from hf_continual.merging.engine.chunks import OutputTensor
from hf_continual.merging.engine.model_output import model_config
from hf_continual.merging.inputs.checkpoint import open_checkpoint
from tests import toy
from tests.merging.world import build, cells, save, tensors

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


NEOX = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64
)
FAMILIES = {
    "llama": lambda vocab: LlamaConfig(**{**TEXT, "vocab_size": vocab}),
    "gpt_neox": lambda vocab: GPTNeoXConfig(vocab_size=vocab, **NEOX),
    "gpt_neox tied": lambda vocab: GPTNeoXConfig(vocab_size=vocab, tie_word_embeddings=True, **NEOX),
    "bloom": lambda vocab: BloomConfig(vocab_size=vocab, hidden_size=16, n_layer=2, n_head=2),
    "falcon": lambda vocab: FalconConfig(vocab_size=vocab, hidden_size=16, num_hidden_layers=2, num_attention_heads=2),
    "opt": lambda vocab: OPTConfig(
        vocab_size=vocab, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16
    ),
    "phi": lambda vocab: PhiConfig(**{**TEXT, "vocab_size": vocab, "num_key_value_heads": 2}),
    "mamba": lambda vocab: MambaConfig(vocab_size=vocab, hidden_size=16, num_hidden_layers=2, state_size=4),
}


@pytest.mark.parametrize(("kind", "short_first"), cells([*FAMILIES, *SEEING], [True, False]))
def test_the_longer_of_two_vocabularies_is_in_the_configuration_too(tmp_path, kind, short_first):
    auto = AutoModelForCausalLM if kind in FAMILIES else AutoModelForImageTextToText
    for seed, (name, vocab) in enumerate((("short", 40), ("long", 43))):
        set_seed(seed)
        config = FAMILIES[kind](vocab) if kind in FAMILIES else SEEING[kind](vocab)
        auto.from_config(config).save_pretrained(tmp_path / name)
    names = ["short", "long"] if short_first else ["long", "short"]
    merge_linear([tmp_path / n for n in names], tmp_path / "out", vocab="extend")
    model, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    get = {n: auto.from_pretrained(tmp_path / n).get_input_embeddings().weight for n in names}
    rows = model.get_input_embeddings().weight
    assert torch.allclose(rows[:40], (get["short"] + get["long"][:40]) / 2, atol=1e-6)
    assert torch.equal(rows[40:], get["long"][40:])
    assert model.get_output_embeddings().weight.shape[0] == 43


def test_a_vocabulary_that_the_configuration_leaves_to_its_default(tmp_path):
    """Transformers 4 omitted default values from the text model's part."""
    for seed, (name, vocab) in enumerate((("short", 40), ("long", 43))):
        seeing("llava", seed, vocab).save_pretrained(tmp_path / name)
    outputs = [OutputTensor("language_model.model.embed_tokens.weight", "F32", (43, 16), ())]
    short = open_checkpoint(tmp_path / "short")
    text = {k: v for k, v in short.config["text_config"].items() if k != "vocab_size"}
    config = model_config(replace(short, config={**short.config, "text_config": text}), outputs, None)
    assert config["text_config"]["vocab_size"] == 43 and "vocab_size" not in config


def test_a_head_that_an_adapter_makes_another_than_its_embedding(tmp_path):
    """Also if the configuration leaves it to the architecture whether the two are tied."""
    base = build("gpt2")
    save(base, tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text())
    config.pop("tie_word_embeddings", None)
    file.write_text(json.dumps(config))
    set_seed(1)
    get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, target_modules=["wte"])).save_pretrained(
        tmp_path / "a"
    )
    load = AutoModelForCausalLM.from_pretrained
    want = said(PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "a"))
    interpolate(tmp_path / "base", tmp_path / "a", tmp_path / "out", alpha=1.0, output="model")
    assert torch.allclose(said(load(tmp_path / "out")), want, atol=1e-5)


@pytest.mark.parametrize("where", ["tokenizer.json", "added_tokens.json", "tokenizer_config.json"])
def test_a_token_without_a_row_is_told_of_with_both_numbers(tmp_path, where):
    base = build()
    rows = base.get_input_embeddings().weight.shape[0]
    for name in ("a", "b"):
        save(base, tmp_path / name)
        if where == "tokenizer.json":
            tokenizer = toy.tokenizer()
            tokenizer.add_tokens(["<more>"])
            tokenizer.save_pretrained(tmp_path / name)
            continue
        file = tmp_path / name / where
        config = json.loads(file.read_text()) if file.is_file() else {}
        more = {"<more>": rows} if where == "added_tokens.json" else {}
        more = more or {"added_tokens_decoder": {str(rows): {"content": "<more>", "special": True}}}
        file.write_text(json.dumps({**config, **more}))
    with pytest.warns(UserWarning, match="same weights"):
        notes = merge_linear([tmp_path / "a", tmp_path / "b"], tmp_path / "out").report["notes"]
    told = [n for n in notes if f"has {rows + 1} tokens" in n and f"{rows} rows" in n and "<more>" in n]
    assert [n.partition(" has ")[0] for n in told] == ["The tokenizer of a", "The tokenizer of b"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # the note's advice
    model.resize_token_embeddings(rows + 1)
    assert model(input_ids=torch.tensor([[rows]])).logits.shape[-1] == rows + 1
