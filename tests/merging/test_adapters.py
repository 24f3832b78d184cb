"""LoRA adapters: exact in every form that PEFT saves, refused if they cannot be exact."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_continual import interpolate, merge_linear, merge_with_recall, task_arithmetic, ties
from hf_continual.merging.errors import MergeError
from tests.merging.world import adapter, build, logits, save, tensors

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*embedding layers:UserWarning",
    "ignore:.*fan_in_fan_out:UserWarning",
    "ignore:.*tie:UserWarning",
    "ignore:Model has",
)

FORMS = {
    "plain": ("llama", {}),
    "tied": ("qwen", {"target_modules": "all-linear"}),
    "rslora": ("llama", {"use_rslora": True, "r": 3}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gemma": ("gemma", {"target_modules": ["o_proj", "down_proj"]}),
    "experts": ("mixtral", {}),
    "biases": ("qwen", {"bias": "all"}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "saved head": ("llama", {"modules_to_save": ["lm_head"]}),
    "saved head of a tied model": ("llama tied", {"modules_to_save": ["lm_head"]}),
    "saved embedding of a tied model": ("llama tied", {"modules_to_save": ["embed_tokens"]}),
    "embedding of a tied model": ("llama tied", {"target_modules": ["q_proj", "embed_tokens"]}),
}


def world(tmp_path, name, config, second=None, **settings):
    base = build(name, **settings)
    save(base, tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (
            base,
            adapter(base, tmp_path / "a1", 1, **config),
            adapter(base, tmp_path / "a2", 2, **(second or config)),
        )


def answered(folder, base):
    """Logits of a model or of an adapter that is not merged into its base."""
    if (folder / "adapter_config.json").is_file():
        return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder))
    return logits(AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize("form", FORMS)
def test_one_adapter_in_a_model_answers_as_the_adapter_on_its_base(tmp_path, form):
    name, config = FORMS[form]
    _, a1, _ = world(tmp_path, name, config)
    interpolate(tmp_path / "base", a1, tmp_path / "out", alpha=1.0, output="model")
    torch.testing.assert_close(answered(tmp_path / "out", None), answered(a1, tmp_path / "base"), rtol=0, atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_model_and_adapter_output_agree(tmp_path, form):
    name, config = FORMS[form]
    # The second adapter has other modules and another rank where the family allows it.
    other = {"r": 2, "target_modules": ["q_proj", "k_proj"]} if name in ("llama", "qwen", "mixtral") else None
    _, a1, a2 = world(tmp_path, name, config, other)
    common = {"base": tmp_path / "base", "weights": [0.3, 0.7]}
    merge_linear([a1, a2], tmp_path / "model", output="model", **common)
    result = merge_linear([a1, a2], tmp_path / "adapter", **common)
    assert result.kind == "adapter" and (tmp_path / "adapter" / "tokenizer.json").is_file()
    torch.testing.assert_close(
        answered(tmp_path / "model", None), answered(tmp_path / "adapter", tmp_path / "base"), rtol=0, atol=3e-6
    )
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    if (
        form != "embedding of a tied model"
    ):  # merge_and_unload adds it to the head as well, which the adapter does not do
        torch.testing.assert_close(
            logits(merged.merge_and_unload()), answered(tmp_path / "model", None), rtol=0, atol=3e-6
        )


def test_the_average_of_adapters_is_the_average_of_their_models(tmp_path):
    _, a1, a2 = world(tmp_path, "llama", {})
    merge_linear([a1, a2], tmp_path / "out", base=tmp_path / "base", weights=[0.3, 0.7])
    load = AutoModelForCausalLM.from_pretrained
    dense = [
        dict(PeftModel.from_pretrained(load(tmp_path / "base"), a).merge_and_unload().named_parameters())
        for a in (a1, a2)
    ]
    merged = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").merge_and_unload()
    for name, value in merged.named_parameters():
        torch.testing.assert_close(value, 0.3 * dense[0][name] + 0.7 * dense[1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dora_is_exact_in_a_model_and_refused_as_an_adapter(tmp_path, name):
    config = {"use_dora": True}
    if name == "gpt2":
        config |= {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    _, a1, a2 = world(tmp_path, name, config, {k: v for k, v in config.items() if k != "use_dora"})
    result = interpolate(tmp_path / "base", a1, tmp_path / "one", alpha=1.0)
    assert result.kind == "model"
    torch.testing.assert_close(answered(tmp_path / "one", None), answered(a1, tmp_path / "base"), rtol=0, atol=3e-6)
    merge_linear([a1, a2], tmp_path / "out", base=tmp_path / "base")
    two = interpolate(tmp_path / "base", a2, tmp_path / "two", alpha=1.0, output="model").output_dir
    merge_linear([tmp_path / "one", two], tmp_path / "dense")
    for key, value in tensors(tmp_path / "dense").items():
        torch.testing.assert_close(tensors(tmp_path / "out")[key], value, rtol=0, atol=1e-6)
    with pytest.raises(MergeError, match=r"a1 has DoRA magnitudes or lora_bias.*output='model'"):
        merge_linear([a1, a2], tmp_path / "no", base=tmp_path / "base", output="adapter")


def test_lora_bias_is_exact_in_a_model(tmp_path):
    _, a1, _ = world(tmp_path, "qwen", {"lora_bias": True})
    interpolate(tmp_path / "base", a1, tmp_path / "one", alpha=1.0)
    torch.testing.assert_close(answered(tmp_path / "one", None), answered(a1, tmp_path / "base"), rtol=0, atol=2e-6)


def test_full_models_and_adapters_mix(tmp_path):
    base, a1, a2 = world(tmp_path, "llama", {})
    full = interpolate(tmp_path / "base", a1, tmp_path / "full", alpha=1.0, output="model").output_dir
    result = merge_linear([full, a2], tmp_path / "mixed", base=tmp_path / "base")
    merge_linear([a1, a2], tmp_path / "adapters", base=tmp_path / "base", output="model")
    assert result.kind == "model"
    for name, value in tensors(tmp_path / "mixed").items():
        torch.testing.assert_close(value, tensors(tmp_path / "adapters")[name], rtol=0, atol=1e-6)
    untouched = [n for n in base.state_dict() if "q_proj" not in n and "v_proj" not in n]
    assert all(torch.equal(tensors(tmp_path / "mixed")[n], base.state_dict()[n]) for n in untouched)


def test_truncation_is_optimal_and_its_error_is_reported(tmp_path):
    _, a1, a2 = world(tmp_path, "llama", {})
    exact = merge_linear([a1, a2], tmp_path / "exact", base=tmp_path / "base")
    small = merge_linear([a1, a2], tmp_path / "small", base=tmp_path / "base", adapter_rank=3)
    assert (exact.rank, small.rank) == (8, 3)
    big, cut = tensors(tmp_path / "exact"), tensors(tmp_path / "small")
    for module, error in small.report["truncation_errors"].items():
        a, b = (f"base_model.model.{module}.lora_{f}.weight" for f in "AB")
        whole, nearest = big[b] @ big[a], cut[b] @ cut[a]
        values = torch.linalg.svdvals(whole.double())
        optimal = float(values[3:].norm() / values.norm())
        assert error == pytest.approx(optimal, rel=1e-5) and 0.05 < error < 1
        assert float((whole - nearest).norm() / whole.norm()) == pytest.approx(optimal, rel=1e-4)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.isfinite(logits(loaded)).all()
    with pytest.warns(UserWarning, match="adapter_rank=64 is more than the exact sum has: the adapter has rank 8"):
        kept = merge_linear([a1, a2], tmp_path / "wide", base=tmp_path / "base", adapter_rank=64)
    assert kept.rank == 8 and all(torch.equal(t, big[n]) for n, t in tensors(tmp_path / "wide").items())


def test_recall_weights_differ_by_layer_inside_an_adapter(tmp_path):
    _, a1, a2 = world(tmp_path, "llama", {})
    weights = {"default": [0.5, 0.5], "layer.1": [0.2, 0.8]}
    merge_with_recall([a1, a2], tmp_path / "adapter", base=tmp_path / "base", weights=weights)
    merge_with_recall([a1, a2], tmp_path / "model", base=tmp_path / "base", weights=weights, output="model")
    torch.testing.assert_close(
        answered(tmp_path / "adapter", tmp_path / "base"), answered(tmp_path / "model", None), rtol=0, atol=2e-6
    )
    one, two, out = (load_file(f / "adapter_model.safetensors") for f in (a1, a2, tmp_path / "adapter"))
    for layer, (u, v) in {0: (0.5, 0.5), 1: (0.2, 0.8)}.items():
        a, b = (f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{f}.weight" for f in "AB")
        wanted = 2 * (u * one[b] @ one[a] + v * two[b] @ two[a])  # alpha / r = 2
        torch.testing.assert_close(out[b] @ out[a], wanted, rtol=0, atol=1e-6)


def test_bf16_base_and_fp32_adapters(tmp_path):
    base, a1, a2 = world(tmp_path, "llama", {}, dtype=torch.bfloat16)
    merge_linear([a1, a2], tmp_path / "out", base=tmp_path / "base", output="model")
    name = "model.layers.0.self_attn.q_proj.weight"
    one, two = load_file(a1 / "adapter_model.safetensors"), load_file(a2 / "adapter_model.safetensors")
    a, b = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{f}.weight" for f in "AB")
    change = (one[b].double() @ one[a].double() + two[b].double() @ two[a].double()) * 2 / 2
    wanted = base.state_dict()[name].double() + change
    merged = tensors(tmp_path / "out")[name]
    assert merged.dtype == torch.bfloat16
    # rounded once: within half a unit in the last place, and a little for fp32
    assert ((merged.double() - wanted).abs() <= wanted.abs() * 2**-8 * 1.01 + 1e-7).all()


REFUSED = {
    "IA3": ({"peft_type": "IA3"}, "is a IA3 adapter; only LoRA adapters"),
    "pissa": (
        {"init_lora_weights": "pissa_niter_4"},
        "initialised with 'pissa_niter_4', which changed the base's weights",
    ),
    "tokens": ({"trainable_token_indices": [1, 2]}, "replaces rows of the embedding"),
    "parameters": (
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        "adapts parameters that are not a module's weight",
    ),
    "alora": ({"alora_invocation_tokens": [3]}, "acts only after some tokens"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_more_than_products_is_refused(tmp_path, kind):
    changes, said = REFUSED[kind]
    _, a1, a2 = world(tmp_path, "llama", {})
    config = json.loads((a2 / "adapter_config.json").read_text())
    (a2 / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(MergeError, match=f"a2 .*{said}.*[Cc]onvert it|a2 .*{said}.*merge_and_unload"):
        merge_linear([a1, a2], tmp_path / "out", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_refused(tmp_path):
    _, a1, a2 = world(tmp_path, "llama", {})
    wide = build("llama", hidden_size=48, num_attention_heads=4)
    other = adapter(wide, tmp_path / "wide", 3)
    with pytest.raises(
        MergeError,
        match=r"wide: factors A \[4, 48\] and B \[48, 4\] do not fit 'model.layers.0.self_attn.q_proj.weight', which is \[32, 32\]",
    ):
        merge_linear([a1, other], tmp_path / "out", base=tmp_path / "base")
    for folder, name in ((a1, "org/one"), (a2, "org/two")):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
    with pytest.raises(MergeError, match=r"a1 was trained on 'org/one' .* but a2 on 'org/two'"):
        merge_linear([a1, a2], tmp_path / "out", base=tmp_path / "base")
    stored = load_file(a1 / "adapter_model.safetensors")
    save_file(
        {n.replace("layers", "blocks"): t for n, t in stored.items()},
        a1 / "adapter_model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        MergeError, match="a1 adapts 'model.blocks.0.self_attn.q_proj.weight', and base has no such tensor"
    ):
        merge_linear([a1], tmp_path / "out", base=tmp_path / "base")
    save_file(
        {n: t for n, t in stored.items() if "lora_B" not in n}, a1 / "adapter_model.safetensors", {"format": "pt"}
    )
    with pytest.raises(MergeError, match="a1 has only lora_A of"):
        merge_linear([a1], tmp_path / "out", base=tmp_path / "base")


def test_rules_that_do_not_add_up_give_models_only(tmp_path):
    _, a1, a2 = world(tmp_path, "llama", {})
    assert ties([a1, a2], tmp_path / "out", base=tmp_path / "base").kind == "model"
    with pytest.raises(
        MergeError, match=r"this method does not add changes up, so its result is not low-rank\. Give output='model'"
    ):
        ties([a1, a2], tmp_path / "no", base=tmp_path / "base", output="adapter")
    added = task_arithmetic([a1, a2], tmp_path / "sum", base=tmp_path / "base", scale=[1.0, -1.0])
    assert added.kind == "adapter"


def test_a_qlora_adapter_goes_onto_the_16_bit_base(tmp_path):
    """An adapter trained on a 4-bit base names no quantisation; the given base decides, and must not be 4-bit."""
    _, a1, _ = world(tmp_path, "llama", {}, dtype=torch.bfloat16)
    interpolate(tmp_path / "base", a1, tmp_path / "out", alpha=1.0, output="model")
    assert tensors(tmp_path / "out")["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(MergeError, match=r"base is quantised \(bitsandbytes\).* 16-bit"):
        interpolate(tmp_path / "base", a1, tmp_path / "no", alpha=1.0)


def test_scaling_is_pefts(tmp_path):
    base = build()
    save(base, tmp_path / "base")
    a1 = adapter(base, tmp_path / "a1", 1, use_rslora=True, r=4, lora_alpha=6)
    merge_linear([a1], tmp_path / "out", base=tmp_path / "base")
    one, out = load_file(a1 / "adapter_model.safetensors"), load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name in one:
        factor = 6 / math.sqrt(4) if "lora_A" in name else 1.0
        torch.testing.assert_close(out[name], factor * one[name], rtol=1e-6, atol=0)
