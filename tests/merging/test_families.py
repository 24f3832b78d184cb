"""Families: a merge's output loads in plain transformers and PEFT and computes the expected values; tied and untied heads."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import set_seed

from hf_continual import interpolate, merge, merge_linear
from hf_continual.merging.errors import MergeError
from tests.families.configs import ENCODERS, KINDS
from tests.families.configs import build as build_family
from tests.families.configs import config as family_config
from tests.families.notes import TARGETS

pytestmark = pytest.mark.filterwarnings("ignore")  # families warn of kernels that are not installed, among others
# Targets of LoRA if "all-linear" is not one product per weight: PEFT adds fused experts (target_parameters), or a router that
# returns two tensors; and modules whose weight is used without their forward pass, which an unmerged adapter misses.
ATTENTION = ["q_proj", "v_proj"]
PLAIN = {
    **dict.fromkeys(("mixtral", "qwen3_moe", "qwen3_next", "olmoe", "minimax", "glm4_moe", "ernie4_5_moe"), ATTENTION),
    "deepseek_v2": ["q_a_proj", "o_proj"],
    "deepseek_v3": ["q_a_proj", "o_proj"],
    "llama4": ATTENTION,
    "llama4_text": ATTENTION,
    "jamba": [*ATTENTION, "in_proj", "up_proj"],
    **{kind: targets for kind, (targets, _) in TARGETS.items()},
}
# New since the table of names was made: linear attention, per-layer embeddings, fused experts, towers.
NEW = ("qwen3_next", "qwen3_5_text", "qwen3_5", "gemma3_text", "gemma3", "gemma4_text", "llama4_text", "llama4")
FUSED = ("mixtral", "qwen3_moe", "qwen3_next", "llama4_text", "gpt_oss")
# Also run by `make test`: a configuration with infinity in it, and an embedding longer than the vocabulary.
ODD = ("mamba2", "mllama")
EVERY = [pytest.param(k, marks=[] if k in (*NEW, *ODD) else pytest.mark.exhaustive) for k in KINDS]


def build(kind: str, seed: int = 0, tied: bool | None = None) -> Any:
    """A tiny random model of a family; biases, norms and what begins at zero are random too."""
    if tied is None:
        model = build_family(kind, seed)
    else:
        config = family_config(kind)
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = tied
        set_seed(seed)
        model = type(build_family(kind))(config)
    torch.manual_seed(seed + 100)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def moved(model: Any, seed: int) -> Any:
    """A copy that moved a little, its tied weights together."""
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return other


def said(model: nn.Module, kind: str) -> torch.Tensor:
    """Logits of some text."""
    ids = torch.arange(4, 24).view(2, 10)
    extra = {"decoder_input_ids": ids} if kind in ENCODERS else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False, **extra).logits.float()


def loaded(like: Any, folder: Any) -> Any:
    """A folder loaded by the class that users load it with; every tensor is loaded."""
    model, info = type(like).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def check_models(tmp_path: Any, kind: str, base: Any) -> None:
    """The mean of two models computes what the mean of their weights does; a rule with rows and an election loads too."""
    folders = []
    for seed in (1, 2):
        moved(base, seed).save_pretrained(tmp_path / f"m{seed}")
        folders.append(tmp_path / f"m{seed}")
    base.save_pretrained(tmp_path / "base")
    mean = copy.deepcopy(base)
    with torch.no_grad():
        parts = [dict(moved(base, seed).named_parameters()) for seed in (1, 2)]
        for name, parameter in mean.named_parameters():
            parameter.copy_((parts[0][name] + parts[1][name]) / 2)
    merge_linear(folders, tmp_path / "out")
    got = loaded(base, tmp_path / "out")
    torch.testing.assert_close(said(got, kind), said(mean, kind), rtol=1e-4, atol=1e-4)
    merge("della", folders, tmp_path / "della", base=tmp_path / "base")
    out = loaded(base, tmp_path / "della")
    assert torch.isfinite(said(out, kind)).all()
    assert (out.get_output_embeddings() is None) == (base.get_output_embeddings() is None)
    if (head := base.get_output_embeddings()) is not None:
        tied = head.weight is base.get_input_embeddings().weight
        assert (out.get_output_embeddings().weight is out.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("kind", EVERY)
def test_models(tmp_path, kind):
    check_models(tmp_path, kind, build(kind))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in NEW[:4] else pytest.mark.exhaustive) for k in NEW])
def test_tied_and_untied(tmp_path, kind, tied):
    base = build(kind, tied=tied)
    assert (base.get_output_embeddings().weight is base.get_input_embeddings().weight) == tied
    check_models(tmp_path, kind, base)


def adapt(base: Any, folder: Any, seed: int, **settings: Any) -> Any:
    """A random LoRA adapter, saved."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, init_lora_weights=False, **settings))
    peft.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", EVERY)
def test_adapters(tmp_path, kind):
    """Merged into its base, an adapter computes what PEFT does; two adapters become one, which PEFT loads."""
    base = build(kind)
    base.save_pretrained(tmp_path / "base")
    targets = PLAIN.get(kind, "all-linear")
    a, b = (adapt(base, tmp_path / n, i, target_modules=targets) for i, n in enumerate("ab", 1))
    fresh = lambda: type(base).from_pretrained(tmp_path / "base")  # noqa: E731
    interpolate(tmp_path / "base", a, tmp_path / "one", alpha=1.0, output="model")
    want = said(PeftModel.from_pretrained(fresh(), a), kind)
    torch.testing.assert_close(said(loaded(base, tmp_path / "one"), kind), want, rtol=1e-4, atol=1e-4)
    assert merge_linear([a, b], tmp_path / "two", base=tmp_path / "base").kind == "adapter"
    merge_linear([a, b], tmp_path / "full", base=tmp_path / "base", output="model")
    got = said(PeftModel.from_pretrained(fresh(), tmp_path / "two"), kind)
    torch.testing.assert_close(got, said(loaded(base, tmp_path / "full"), kind), rtol=1e-4, atol=1e-4)


def fused(model: Any) -> list[str]:
    """Names of weights of all experts in one tensor."""
    return [n for n, p in model.named_parameters() if "experts" in n and p.dim() == 3 and not n.endswith("bias")]


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k == "llama4_text" else pytest.mark.exhaustive) for k in FUSED]
)
def test_adapters_of_fused_experts_are_refused_and_the_advice_works(tmp_path, kind):
    base = build(kind)
    base.save_pretrained(tmp_path / "base")
    names = sorted({n.partition("layers.")[2].partition(".")[2] for n in fused(base)})
    assert names, "this family has no fused experts"
    made = [
        adapt(base, tmp_path / n, i, target_modules=["q_proj"], target_parameters=names) for i, n in enumerate("ab", 1)
    ]
    assert json.loads((made[0] / "adapter_config.json").read_text())["target_parameters"]
    with pytest.raises(MergeError, match=r"a adapts parameters that are not a module's weight .*merge_and_unload"):
        merge_linear(made, tmp_path / "out", base=tmp_path / "base")
    wholes = []
    for folder in made:
        put = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), folder).merge_and_unload()
        put.save_pretrained(tmp_path / f"{folder.name}-whole")
        wholes.append(put)
    merge_linear([tmp_path / "a-whole", tmp_path / "b-whole"], tmp_path / "out")
    out = dict(loaded(base, tmp_path / "out").named_parameters())
    for name in fused(base):
        one, two = (dict(w.named_parameters())[name] for w in wholes)
        torch.testing.assert_close(out[name], (one + two) / 2, rtol=1e-5, atol=1e-6)
        assert not torch.equal(one, dict(base.named_parameters())[name])
