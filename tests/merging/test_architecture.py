"""Files against configuration against architecture: whatever transformers or PEFT would load differently is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_continual import interpolate, kif_fuse, merge_linear, task_arithmetic, ties
from hf_continual.merging.errors import MergeError
from hf_continual.merging.inputs.adapter_options import KNOWN_OPTIONS
from hf_continual.merging.inputs.architecture import read_architecture
from hf_continual.merging.inputs.checkpoint import open_checkpoint
from tests.merging.world import CONFIGS, adapter, build, family, logits, save, tensors

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*embedding layers:UserWarning", "ignore:.*fan_in_fan_out:UserWarning", "ignore:.*tie:UserWarning"
)
ADAPTER, MODEL = "adapter_model.safetensors", "model.safetensors"


def edit(folder, name="adapter_config.json", **changes):
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**config, **changes}))


def edit_tensors(folder, change, name=ADAPTER):
    stored = load_file(folder / name)
    change(stored)
    save_file(stored, folder / name, {"format": "pt"})


@pytest.mark.parametrize("name", CONFIGS)
def test_a_whole_model_of_every_family_is_whole_in_what_it_lacks_too(tmp_path, name):
    model = open_checkpoint(save(build(name), tmp_path / "m"))
    assert read_architecture(model).unknown is None


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("who", ["first", "second", "both"])
def test_a_tensor_that_is_gone(tmp_path, name, who):
    _, a, b = family(tmp_path)
    for folder in [a, b] if who == "both" else [a if who == "first" else b]:
        edit_tensors(folder, lambda t: t.pop(name), MODEL)
    with pytest.raises(MergeError, match=name):
        merge_linear([a, b], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_untied_head_that_is_gone_can_be_declared_tied(tmp_path):
    """The message's advice works: transformers then takes the embedding."""
    _, a, b = family(tmp_path)
    for folder in (a, b):
        edit_tensors(folder, lambda t: t.pop("lm_head.weight"), MODEL)
    with pytest.raises(MergeError, match=r"lm_head\.weight.*initialise them at random.*set tie_word_embeddings"):
        merge_linear([a, b], tmp_path / "out")
    for folder in (a, b):
        edit(folder, "config.json", tie_word_embeddings=True)
    merge_linear([a, b], tmp_path / "out")
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_hidden_layers": 10**9}, "says 1000000000 blocks, but its files hold"),
        ({"intermediate_size": 48}, r"mlp.* is \[.*\] in its files but \[.*\] by its config\.json"),
        ({"num_attention_heads": 0}, "transformers cannot build m1 from its config.json"),
        ({"hidden_size": 2**60}, "transformers cannot build m1|by its config"),
    ],
)
def test_numbers_of_a_configuration_that_the_files_do_not_bear_out(tmp_path, changes, said):
    _, a, b = family(tmp_path)
    for folder in (a, b):
        edit(folder, "config.json", **changes)
    with pytest.raises(MergeError, match=said):
        merge_linear([a, b], tmp_path / "out")


def test_a_model_that_transformers_does_not_know_is_merged_with_a_note(tmp_path):
    _, a, b = family(tmp_path)
    for folder in (a, b):
        edit(folder, "config.json", model_type="homemade", architectures=["Homemade"], auto_map={"AutoModel": "x.Y"})
    notes = merge_linear([a, b], tmp_path / "out").report["notes"]
    assert any("m1 holds every tensor" in n and "does not know model_type='homemade'" in n for n in notes)


def test_an_adapter_alone_of_a_process_that_has_not_loaded_transformers(tmp_path):
    base = build(num_hidden_layers=1)
    save(base, tmp_path / "base")
    adapter(base, tmp_path / "a", 1)
    edit_tensors(tmp_path / "a", lambda t: [t.pop(k) for k in list(t) if "v_proj" in k])
    code = (
        "import sys\nfrom hf_continual import interpolate\n"
        "try:\n    interpolate('base', 'a', 'out', alpha=1.0)\n"
        "except RuntimeError as error:\n    print(error, 'transformers' in sys.modules)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "a is incomplete" in ran.stdout and "v_proj.lora_A" in ran.stdout and ran.stdout.endswith("False\n")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("world")
    base = build(num_hidden_layers=2)
    save(base, tmp / "base")
    adapter(base, tmp / "good", 2)
    return tmp, base


def without(part):
    return lambda folder: edit_tensors(folder, lambda t: [t.pop(k) for k in list(t) if part in k])


WRONG = {
    "r negative": (lambda f: edit(f, r=-2), r"says r=-2; it must be a whole number above 0"),
    "r 0": (lambda f: edit(f, r=0), "says r=0"),
    "r true": (lambda f: edit(f, r=True), "says r=True"),
    "r text": (lambda f: edit(f, r="4"), "says r='4'"),
    "r absent": (lambda f: edit(f, r=None), "says r=None"),
    "r of another file": (lambda f: edit(f, r=8), r"the rank 8, which sets its scale, but its factors are A \[4, 32\]"),
    "r huge": (lambda f: edit(f, r=2**62), "which sets its scale"),
    "alpha nan": (lambda f: edit(f, lora_alpha=float("nan")), "lora_alpha=nan; it must be a finite number"),
    "alpha infinite": (lambda f: edit(f, lora_alpha=float("inf")), "lora_alpha=inf"),
    "alpha a list": (lambda f: edit(f, lora_alpha=[8]), r"lora_alpha=\[8\]"),
    "rank pattern a list": (lambda f: edit(f, rank_pattern=["q_proj"]), r"rank_pattern=\['q_proj'\]; it must be an object"),
    "rank pattern wrong": (lambda f: edit(f, rank_pattern={"layers.1.self_attn.q_proj": 3}), "the rank 3"),
    "rank pattern no expression": (lambda f: edit(f, rank_pattern={"q_proj(": 4}), r"rank_pattern='q_proj\('.*regular exp"),
    "rank pattern 0": (lambda f: edit(f, rank_pattern={"q_proj": 0}), r"rank_pattern\['q_proj'\]=0"),
    "alpha pattern text": (lambda f: edit(f, alpha_pattern={"q_proj": "x"}), r"alpha_pattern\['q_proj'\]='x'"),
    "targets no expression": (lambda f: edit(f, target_modules="(q_proj"), r"target_modules='\(q_proj'"),
    "targets numbers": (lambda f: edit(f, target_modules=[1]), r"target_modules=\[1\]; it must be a list of names"),
    "targets fewer": (lambda f: edit(f, target_modules=["q_proj"]), "4 factors that PEFT would ignore .*v_proj"),
    "targets more": (lambda f: edit(f, target_modules=["q_proj", "v_proj", "o_proj"]), "incomplete.*o_proj.*exclude_modules"),
    "targets of nothing": (lambda f: edit(f, target_modules=["nothing"]), "PEFT cannot apply bad to base.*nothing"),
    "layers fewer": (lambda f: edit(f, layers_to_transform=[0]), r"PEFT would ignore .*layers\.1"),
    "bias unknown": (lambda f: edit(f, bias="some"), "bias='some'"),
    "DoRA without magnitudes": (lambda f: edit(f, use_dora=True), "use_dora=True, but its file has no lora_magnitude_vector"),
    "bias of B that is not there": (lambda f: edit(f, lora_bias=True), "lora_bias=True"),
    "saved module that is not there": (lambda f: edit(f, modules_to_save=["lm_head"]), "its file has no tensors for lm_head"),
    "a layer gone": (without("layers.1."), r"incomplete.*4 tensors in all \(.*layers\.1\.self_attn\.q_proj\.lora_A"),
    "a module gone": (without("v_proj"), "incomplete.*v_proj"),
    "no tensors": (without(""), "bad holds no tensors at all"),
    "half a product": (without("v_proj.lora_B"), "has only lora_A of"),
    "numbers as factors": (lambda f: edit_tensors(f, lambda t: t.update({k: v.int() for k, v in t.items()})), "as I32"),
}  # fmt: skip


@pytest.mark.parametrize("how", WRONG)
def test_an_adapter_whose_files_contradict_each_other(world, tmp_path, how):
    tmp, base = world
    change, said = WRONG[how]
    bad = adapter(base, tmp_path / "bad", 1)
    change(bad)
    for merge in (
        lambda: merge_linear([tmp / "good", bad], tmp_path / "out", base=tmp / "base"),
        lambda: ties([bad, tmp / "good"], tmp_path / "out", base=tmp / "base"),
        lambda: interpolate(tmp / "base", bad, tmp_path / "out", alpha=1.0),
    ):
        with pytest.raises(MergeError, match=f"bad.*{said}|{said}"):
            merge()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["r negative", "r of another file", "DoRA without magnitudes", "half a product"])
def test_a_fusion_of_adapters_compares_them_too(world, tmp_path, how):
    _, base = world
    change, said = WRONG[how]
    folders = [adapter(base, tmp_path / n, 1) for n in ("bad", "worse")]
    for folder in folders:
        change(folder)
    with pytest.raises(MergeError, match=said):
        kif_fuse(*folders, tmp_path / "out", importance=tmp_path / "bad" / ADAPTER)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"\xff\xfe", b'{"a":' + b"[" * 100_000, b'{"r": 4'])
def test_an_adapter_configuration_that_is_not_one(world, tmp_path, data):
    tmp, base = world
    bad = adapter(base, tmp_path / "bad", 1)
    (bad / "adapter_config.json").write_bytes(data)
    with pytest.raises(MergeError, match=r"bad/adapter_config\.json "):
        merge_linear([tmp / "good", bad], tmp_path / "out", base=tmp / "base")


def test_what_was_taken_out_on_purpose_is_merged_when_it_is_named(world, tmp_path):
    """Follow the advice in the message of an incomplete adapter."""
    tmp, base = world
    bad = adapter(base, tmp_path / "bad", 1)
    without("layers.1.")(bad)
    edit(bad, exclude_modules=["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"])
    interpolate(tmp / "base", bad, tmp_path / "out", alpha=1.0, output="model")
    want = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp / "base"), bad))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), want)


@pytest.mark.parametrize("alpha", [0, -8, 0.5, 1e-30])
def test_scales_that_peft_loads_are_merged_as_it_does(world, tmp_path, alpha):
    tmp, base = world
    strange = adapter(base, tmp_path / "a", 1, lora_alpha=alpha)
    interpolate(tmp / "base", strange, tmp_path / "out", alpha=1.0, output="model")
    want = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp / "base"), strange))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), want)


def test_every_option_of_the_installed_peft_is_known():
    assert set(LoraConfig.__dataclass_fields__) - KNOWN_OPTIONS == set()


@pytest.mark.parametrize("value", [True, {"k": 1}, [1]])
def test_an_unknown_option_that_is_switched_on_is_refused(world, tmp_path, value):
    tmp, base = world
    strange = adapter(base, tmp_path / "a", 1)
    edit(strange, brand_new=value, peft_version="9.1")
    with pytest.raises(MergeError, match=r"a was saved by PEFT 9\.1 with brand_new=.*merge_and_unload"):
        task_arithmetic([strange], tmp_path / "out", base=tmp / "base")


@pytest.mark.parametrize(("value", "named"), [(16, True), ("fast", True), (None, False), (False, False), ([], False)])
def test_an_unknown_option_that_may_be_a_default_is_named(world, tmp_path, value, named):
    tmp, base = world
    strange = adapter(base, tmp_path / "a", 1)
    edit(strange, brand_new=value)
    notes = merge_linear([strange, tmp / "good"], tmp_path / "out", base=tmp / "base").report["notes"]
    assert any(f"brand_new={value!r}" in n for n in notes) is named


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize(
    "targets", [["c_attn", "c_proj"], ["c_proj"], ["c_attn", "c_fc", "lm_head"], ["wte", "c_proj"]]
)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_how_a_weight_lies_is_taken_from_its_module_and_not_from_a_flag(tmp_path, flag, targets, kind):
    """c_attn and c_fc are not square, the attention's c_proj is; the head is a linear layer; the flag is either."""
    base = build("gpt2", n_layer=1, tie_word_embeddings=False)
    save(base, tmp_path / "base")
    made = adapter(base, tmp_path / "a", 1, target_modules=targets, use_dora=kind == "dora")
    edit(made, fan_in_fan_out=flag)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = logits(PeftModel.from_pretrained(plain, made))
    interpolate(tmp_path / "base", made, tmp_path / "out", alpha=1.0, output="model")
    got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("output", ["model", "adapter"])
@pytest.mark.parametrize("who", ["one", "both"])
def test_rows_that_an_adapter_brings_with_its_embedding(tmp_path, output, who):
    """PEFT loads them in place of the base's; an adapter that holds the base's own rows changes nothing."""
    base = build(num_hidden_layers=1)
    save(base, tmp_path / "base")
    targets = {"target_modules": ["q_proj", "embed_tokens"]}
    folders = [adapter(base, tmp_path / n, i, **targets) for i, n in enumerate(("a", "b"), 1)]
    for folder in folders[: 2 if who == "both" else 1]:
        rows = "base_model.model.model.embed_tokens.base_layer.weight"
        edit_tensors(folder, lambda t: t[rows][-5:].add_(0.5))
    whole = []
    for folder in folders:
        put = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)
        whole.append(put.merge_and_unload().state_dict())
    merge_linear(folders, tmp_path / "out", base=tmp_path / "base", weights=[1, 3], output=output)
    if output == "adapter":
        put = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out")
        found = put.merge_and_unload().state_dict()
    else:
        found = tensors(tmp_path / "out")
    for name, one in whole[0].items():
        torch.testing.assert_close(found[name], (one + 3 * whole[1][name]) / 4, atol=2e-6, rtol=2e-5)
