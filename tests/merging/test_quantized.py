"""Adapters of a quantised base: applied to the original weights or to the values they saw, or refused; compared with bitsandbytes itself."""

from __future__ import annotations

import json

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_continual import kif_fuse, magnitude_max, merge_linear, merge_with_recall, task_arithmetic, ties
from hf_continual.merging.engine import chunks, combine
from hf_continual.merging.errors import MergeError
from hf_continual.merging.inputs import dequantization as dequantized
from hf_continual.merging.inputs.dequantization import linear_weights
from hf_continual.merging.inputs.members import open_members
from hf_continual.merging.inputs.quantization import Quantization, known_quantization, read_quantization
from hf_continual.merging.inputs.safetensors_file import DTYPES, Files, view
from tests.merging.world import adapter, build, logits, save, tensors, tuned

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
SCHEMES = {
    "nf4, double": NF4,
    "nf4": {**NF4, "bnb_4bit_use_double_quant": False},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
    "one left out": {**NF4, "llm_int8_skip_modules": ["q_proj", "lm_head"]},
}
# 36 columns: rows and blocks of 64 do not end together, and neither do chunks of odd length. (bitsandbytes 0.50 gives
# wrong values on a CPU for weights whose width is a multiple of 32 and not of 64; on other widths it is the reference.)
SIZES = {"hidden_size": 36, "intermediate_size": 52, "num_attention_heads": 3, "num_key_value_heads": 3}


def seen_by_bitsandbytes(folder, scheme, dtype):
    """Every weight of the base as bitsandbytes dequantises it, by name."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**scheme), dtype=dtype)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            found[f"{name}.weight"] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            codes, scales = module.weight.data, module.weight.SCB
            found[f"{name}.weight"] = bnb.functional.int8_vectorwise_dequant(codes, scales).to(dtype)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_base_is_read_as_bitsandbytes_shows_it(tmp_path, scheme, dtype):
    base = build(dtype=dtype, **SIZES)
    folder, a = save(base, tmp_path / "base"), adapter(base, tmp_path / "a", 1)
    wanted = seen_by_bitsandbytes(folder, scheme, dtype)
    _, full = open_members([a], folder, BitsAndBytesConfig(**scheme))
    assert {n for n, t in full.tensors.items() if t.lens is not None} == wanted.keys() and len(wanted) in (18, 21)
    stored = tensors(folder)
    with Files() as files:
        for name, tensor in full.tensors.items():
            assert torch.equal(files.load(tensor), wanted.get(name, stored[name])), name
        # Any range gives the same numbers, whatever its ends; so do rows.
        tensor = full.tensors["model.layers.1.mlp.down_proj.weight"]
        for start, stop in ((0, 1), (5, 71), (63, 65), (700, tensor.numel)):
            raw = torch.empty((stop - start) * tensor.itemsize, dtype=torch.uint8)
            files.read_into(tensor, start, stop, view(raw))
            assert torch.equal(raw.view(DTYPES[tensor.dtype]), wanted[tensor.name].flatten()[start:stop])
        assert torch.equal(files.load(tensor.rows(7, 20)), wanted[tensor.name][7:20])
    assert any(not torch.equal(wanted[n], stored[n]) for n in wanted)


def test_the_merge_is_what_was_trained(tmp_path):
    base = build(**SIZES)
    folder, a = save(base, tmp_path / "base"), adapter(base, tmp_path / "a", 1)
    result = merge_linear([a], tmp_path / "seen", base=folder, output="model", quantized_base=NF4)
    merge_linear([a], tmp_path / "original", base=folder, output="model")
    live = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.float32)
    )
    for module in live.modules():
        # On processors with bf16 arithmetic bitsandbytes computes evaluation in bf16, for widths of whole 32s only.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    trained = logits(PeftModel.from_pretrained(live, a))
    ours = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "seen"))
    original = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "original"))
    torch.testing.assert_close(ours, trained, rtol=0, atol=2e-5)
    assert (original - trained).abs().max() > 100 * (ours - trained).abs().max()
    described = result.report["models"][0]
    assert described["seen_as"] == {"kind": "nf4", "double": True, "skip": None, "dtype": None}
    assert "after 4 bits (nf4, double quantisation) and back" in (tmp_path / "seen" / "README.md").read_text()


def test_the_original_is_the_default_and_the_card_says_so(tmp_path):
    base = build(**SIZES)
    folder, a = save(base, tmp_path / "base"), adapter(base, tmp_path / "a", 1)
    merge_linear([a], tmp_path / "plain", base=folder, output="model")
    note(a, NF4)
    merge_linear([a], tmp_path / "noted", base=folder, output="model")
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() == (
        tmp_path / "noted" / "model.safetensors"
    ).read_bytes()
    said = "a was trained on a base in 4 bits (nf4, double quantisation); what was learned is added to the original weights"
    assert (
        said in (tmp_path / "noted" / "README.md").read_text()
        and "4 bits" not in (tmp_path / "plain" / "README.md").read_text()
    )
    with pytest.raises(MergeError, match="a was trained on a base in 4 bits .*, and quantized_base='error'"):
        merge_linear([a], tmp_path / "no", base=folder, output="model", quantized_base="error")
    with pytest.warns(UserWarning, match="is the only model"):
        merge_linear([folder], tmp_path / "copy", base=folder, quantized_base="error")


def note(folder, scheme):
    facts = {"format": 1, "relation": "adapter", "name": folder.name, "adapter": {"r": 4, "quantization": scheme}}
    (folder / "continual_config.json").write_text(json.dumps(facts))


@pytest.mark.filterwarnings("ignore:In .* of the layers:UserWarning")
def test_every_method_takes_what_the_folder_says(tmp_path):
    base = build(**SIZES)
    folder = save(base, tmp_path / "base")
    both = [adapter(base, tmp_path / "a", 1), adapter(base, tmp_path / "b", 2)]
    for a in both:
        note(a, NF4)
    wanted = seen_by_bitsandbytes(folder, NF4, torch.float32)["model.layers.0.mlp.up_proj.weight"]  # no adapter here
    options = {"base": folder, "output": "model", "quantized_base": "dequantize"}
    for method in (merge_linear, task_arithmetic, ties, magnitude_max, merge_with_recall):
        extra = {"calibration": ["red owl sees", "the blue fox runs"]} if method is merge_with_recall else {}
        method(both, tmp_path / method.__name__, **options, **extra)
        assert torch.equal(tensors(tmp_path / method.__name__)["model.layers.0.mlp.up_proj.weight"], wanted)


def test_recall_looks_at_the_weights_that_are_merged(tmp_path):
    from hf_continual.merging.inputs.run_model import Setting, loaded

    base = build(**SIZES)
    folder, a = save(base, tmp_path / "base"), adapter(base, tmp_path / "a", 1)
    (member,), _ = open_members([a], folder, NF4)
    merge_linear([a], tmp_path / "merged", base=folder, output="model", quantized_base=NF4)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    with loaded(member, Setting("cpu", "float32")) as model:
        torch.testing.assert_close(logits(model), merged, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="low_memory=True reads blocks from disk"):
        merge_with_recall(
            [a], tmp_path / "no", base=folder, calibration=["owl"], quantized_base=NF4, low_memory=True, output="model"
        )


def test_what_cannot_be_is_said(tmp_path):
    base = build(**SIZES)
    folder = save(base, tmp_path / "base")
    a, b = adapter(base, tmp_path / "a", 1), adapter(base, tmp_path / "b", 2)
    call = {"base": folder, "output": "model"}
    with pytest.raises(
        ValueError, match="quantized_base='4bit': it must be one of 'error', 'original', 'dequantize', or a Bits"
    ):
        merge_linear([a], tmp_path / "no", **call, quantized_base="4bit")
    with pytest.raises(MergeError, match="no file states how the base of a was quantised, or whether it was. Give how"):
        merge_linear([a], tmp_path / "no", **call, quantized_base="dequantize")
    with pytest.raises(ValueError, match="quantised by 'gptq' .* cannot be reproduced here"):
        merge_linear([a], tmp_path / "no", **call, quantized_base={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="the output is an adapter, which leaves it unchanged"):
        merge_linear([a], tmp_path / "no", base=folder, quantized_base=NF4)
    with (
        pytest.warns(UserWarning, match="probably did not continue from that adapter"),
        pytest.raises(ValueError, match="adapters are fused directly, without a base"),
    ):
        kif_fuse(a, b, tmp_path / "no", calibration_new=["owl"], calibration_old=["fox"], quantized_base="dequantize")
    note(a, NF4)
    note(b, SCHEMES["int8"])
    with pytest.raises(MergeError, match="b was trained on a base in 8 bits, and a in 4 bits .*: they saw different"):
        merge_linear([a, b], tmp_path / "no", **call, quantized_base="dequantize")
    gpt = save(build("gpt2"), tmp_path / "gpt2")
    on_gpt = adapter(build("gpt2"), tmp_path / "c", 1, target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(MergeError, match=r"'transformer.h.0.attn.c_attn' of gpt2 is stored transposed \(Conv1D\)"):
        merge_linear([on_gpt], tmp_path / "no", base=gpt, output="model", quantized_base=NF4)
    wide = save(build(dtype=torch.float64), tmp_path / "wide")
    on_wide = adapter(build(dtype=torch.float64), tmp_path / "d", 1)
    with pytest.raises(MergeError, match="of wide is F64, which bitsandbytes does not quantise"):
        merge_linear([on_wide], tmp_path / "no", base=wide, output="model", quantized_base=NF4)
    assert not (tmp_path / "no").exists()


def test_several_adapters_must_have_seen_the_same(tmp_path):
    """Different although their folders share a name; equal although omitted modules are named in several ways."""
    base = build(**SIZES)
    folder = save(base, tmp_path / "base")
    one, two = adapter(base, tmp_path / "law" / "final", 1), adapter(base, tmp_path / "tax" / "final", 2)
    call = {"base": folder, "output": "model", "quantized_base": "dequantize"}
    note(one, NF4)
    with pytest.raises(
        MergeError, match=r"no file states how the base of final was quantised, .* \(final was .* 4 bits"
    ):
        merge_linear([one, two], tmp_path / "no", **call)
    note(two, SCHEMES["int8"])
    with pytest.raises(
        MergeError, match="final was trained on a base in 8 bits, and final in 4 bits .*: they saw diff"
    ):
        merge_linear([one, two], tmp_path / "no", **call)
    with pytest.raises(MergeError, match="8 bits, and quantized_base= says 4 bits"):
        merge_linear([two], tmp_path / "no", **{**call, "quantized_base": NF4})
    note(two, {**NF4, "llm_int8_skip_modules": ["lm_head"]})
    merge_linear([one, two], tmp_path / "same", **call)
    note(one, {**NF4, "llm_int8_skip_modules": ["q_proj", "lm_head"]})
    note(two, {**NF4, "llm_int8_skip_modules": ["lm_head", "q_proj"]})
    merge_linear([one, two], tmp_path / "sorted", **call)
    note(two, {**NF4, "llm_int8_skip_modules": ["v_proj", "lm_head"]})
    with pytest.raises(
        MergeError, match=r"without lm_head, v_proj\), and final in 4 bits \(.*without lm_head, q_proj\)"
    ):
        merge_linear([one, two], tmp_path / "no", **call)


def test_a_base_of_another_library_is_no_obstacle_to_the_original(tmp_path):
    base = build(**SIZES)
    folder, a = save(base, tmp_path / "base"), adapter(base, tmp_path / "a", 1)
    note(a, {"quant_method": "gptq", "bits": 4})
    merge_linear([a], tmp_path / "adapter", base=folder)
    merge_linear([a], tmp_path / "out", base=folder, output="model")
    assert (
        "a was trained on a base in the form of 'gptq'; what was learned"
        in (tmp_path / "out" / "README.md").read_text()
    )
    for word, said in (
        ("error", "in the form of 'gptq', and quantized_base='error'"),
        ("dequantize", "only its own library"),
    ):
        with pytest.raises(MergeError, match=said):
            merge_linear([a], tmp_path / "no", base=folder, output="model", quantized_base=word)


def test_it_is_about_adapters_and_a_base(tmp_path):
    base = build(**SIZES)
    folder, other = save(base, tmp_path / "base"), save(tuned(base, 1), tmp_path / "tuned")
    for method in (merge_linear, task_arithmetic):
        for given in (NF4, "dequantize"):
            with pytest.raises(MergeError, match="none of the models is an adapter. Leave it out"):
                method([folder, other], tmp_path / "no", base=folder, quantized_base=given)
    with pytest.raises(ValueError, match="applies to base=, which was not given"):
        merge_linear([folder, other], tmp_path / "no", quantized_base="dequantize")
    a = adapter(base, tmp_path / "a", 1)
    for wrong, said in (({"bnb_4bit_quant_typ": "nf4"}, "has the key 'bnb_4bit_quant_typ'"), ({"bnb_4bit_quant_type": "nf5"}, "'nf5': it must be"),
                        ({"dtype": "int4"}, "dtype='int4': bitsandbytes quantises")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            merge_linear(
                [a], tmp_path / "no", base=folder, output="model", quantized_base={"load_in_4bit": True, **wrong}
            )


@pytest.mark.parametrize("scheme", [NF4, SCHEMES["int8"]], ids=["nf4", "int8"])
def test_the_type_it_was_loaded_in_counts(tmp_path, scheme):
    """Stored in float32, loaded and quantised in bfloat16: those values, and not those of float32."""
    base = build(dtype=torch.float32, **SIZES)
    folder, a = save(base, tmp_path / "base"), adapter(base, tmp_path / "a", 1)
    note(a, {**scheme, "dtype": "bfloat16"})
    wanted = seen_by_bitsandbytes(folder, scheme, torch.bfloat16)
    _, full = open_members([a], folder, "dequantize")
    _, other = open_members([a], folder, scheme)
    with Files() as files:
        for name, values in wanted.items():
            assert torch.equal(files.load(full.tensors[name]), values.float()), name
            assert torch.equal(files.load(other.tensors[name]), values.float()), (
                name
            )  # the folder supplies what was not given


def test_blocks_and_passes_end_anywhere(tmp_path, monkeypatch):
    """Scales found in many passes, weights read in many blocks, DoRA's rows: the same numbers."""
    base = build(**SIZES)
    folder = save(base, tmp_path / "base")
    plain, dora = adapter(base, tmp_path / "a", 1), adapter(base, tmp_path / "b", 2, use_dora=True)
    call = {"base": folder, "output": "model", "quantized_base": NF4}
    merge_linear([plain, dora], tmp_path / "usual", **call)
    merge_linear([plain], tmp_path / "seen", **call, weights=[1])
    monkeypatch.setattr(dequantized, "_PASS", 128)
    monkeypatch.setattr(chunks, "_STEP", 32)
    monkeypatch.setattr(chunks, "CHUNK", 96)
    monkeypatch.setattr(chunks, "BLOCK", 288)
    monkeypatch.setattr(combine, "DORA_ROWS", 100)
    merge_linear([plain, dora], tmp_path / "small", **call)
    for name, value in tensors(tmp_path / "usual").items():
        torch.testing.assert_close(tensors(tmp_path / "small")[name], value, rtol=0, atol=1e-6)
    monkeypatch.undo()
    quantised = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**NF4))
    quantised.dequantize()
    quantised.save_pretrained(tmp_path / "dequantised")
    config = json.loads((tmp_path / "dequantised" / "config.json").read_text())
    config.pop("quantization_config", None)
    (tmp_path / "dequantised" / "config.json").write_text(json.dumps(config))
    merge_linear([plain, dora], tmp_path / "by hand", base=tmp_path / "dequantised", output="model")
    for name, value in tensors(tmp_path / "usual").items():
        torch.testing.assert_close(tensors(tmp_path / "by hand")[name], value, rtol=0, atol=1e-6)


def test_a_merged_adapter_still_knows_its_base(tmp_path):
    base = build(**SIZES)
    folder = save(base, tmp_path / "base")
    both = [adapter(base, tmp_path / n, i) for i, n in enumerate("ab")]
    for a in both:
        note(a, {**NF4, "dtype": "float32"})
    merge_linear(both, tmp_path / "sum", base=folder)
    card = (tmp_path / "sum" / "README.md").read_text()
    assert "original weights" not in card and "The base was quantised during training" in card
    with pytest.raises(MergeError, match="sum was trained on a base in 4 bits"):
        merge_linear([tmp_path / "sum"], tmp_path / "no", base=folder, output="model", quantized_base="error")
    merge_linear([tmp_path / "sum"], tmp_path / "out", base=folder, output="model", quantized_base="dequantize")
    merge_linear(both, tmp_path / "at once", base=folder, output="model", quantized_base="dequantize")
    for name, value in tensors(tmp_path / "out").items():
        torch.testing.assert_close(tensors(tmp_path / "at once")[name], value, rtol=0, atol=1e-6)


def test_a_report_repeated_on_another_base_is_warned_about(tmp_path):
    base = build(**SIZES)
    folder, a = save(base, tmp_path / "base"), adapter(base, tmp_path / "a", 1)
    call = {"base": folder, "output": "model"}
    merge_with_recall([a], tmp_path / "one", weights={"default": [0.5, 0.5]}, **call, quantized_base=NF4)
    report = tmp_path / "one" / "recall_report.json"
    with pytest.warns(UserWarning, match="to the base as quantised by .*nf4.*, this one to the base as stored"):
        merge_with_recall([a], tmp_path / "two", weights=report, **call)
    merge_with_recall([a], tmp_path / "three", weights=report, **call, quantized_base=NF4)
    one, three = (tmp_path / n / "model.safetensors" for n in ("one", "three"))
    assert one.read_bytes() == three.read_bytes()


def test_how_a_base_was_quantised_is_found(tmp_path):
    base = build(**SIZES)
    folder, a = save(base, tmp_path / "base"), adapter(base, tmp_path / "a", 1)
    (one,), _ = open_members([a], folder)
    assert known_quantization(one.own) is None
    config = json.loads((a / "adapter_config.json").read_text())
    for named, wanted in (
        (str(tmp_path / "quantised"), Quantization("nf4", True)),
        ("me/not-here", None),
        ("../x", None),
    ):
        (tmp_path / "quantised").mkdir(exist_ok=True)
        (tmp_path / "quantised" / "config.json").write_text(json.dumps({"quantization_config": NF4}))
        (a / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": named}))
        (one,), _ = open_members([a], folder)
        found = known_quantization(one.own)
        assert (None if found is None else found.quantization) == wanted
    whole = BitsAndBytesConfig(**NF4).to_dict()
    assert read_quantization(whole) == Quantization("nf4", True) == read_quantization(NF4)
    assert read_quantization(BitsAndBytesConfig(load_in_8bit=True).to_dict()) == Quantization("int8")


def test_what_is_quantised_is_transformers_choice(tmp_path):
    qwen = save(build("qwen"), tmp_path / "qwen")
    (_,), full = open_members([qwen], qwen)
    found = linear_weights(full, Quantization("nf4"))
    assert len(found) == 21 and not any("embed" in n or "lm_head" in n for n in found)
