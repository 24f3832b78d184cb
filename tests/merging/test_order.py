"""A model's place does not matter: any order of full models and adapters, with weights ordered alike, is the same merge."""

from __future__ import annotations

import json
from itertools import permutations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hf_continual import (
    interpolate,
    kif_fuse,
    magnitude_max,
    merge_linear,
    merge_with_recall,
    task_arithmetic,
    ties,
)
from hf_continual.merging.errors import MergeError
from tests import toy
from tests.merging.world import adapter, build, save, tensors, tuned

SHARES = {"full": 0.5, "one": 0.3, "two": 0.2, "base": 0.4}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("order")
    base = build(num_hidden_layers=1)
    folders = {"base": save(base, tmp / "base"), "full": save(tuned(base, 7, 0.05), tmp / "full")}
    folders["one"] = adapter(base, tmp / "one", 1)
    folders["two"] = adapter(base, tmp / "two", 2, r=2, target_modules=["down_proj", "q_proj"])
    whole = {n: tensors(folders[n]) for n in ("base", "full")}
    for name in ("one", "two"):
        put = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders["base"]), folders[name])
        whole[name] = {k: v.detach() for k, v in put.merge_and_unload().state_dict().items()}
    return folders, whole


def merged(folder, base):
    """All weights of a model, or of its base with an adapter."""
    if not (folder / "adapter_config.json").is_file():
        return tensors(folder)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).merge_and_unload().state_dict()


RULES = {
    "linear": lambda m, out, base, w: merge_linear(m, out, base=base, weights=w),
    "task_arithmetic": lambda m, out, base, w: task_arithmetic(m, out, base=base, scale=w),
    "ties": lambda m, out, base, w: ties(m, out, base=base, scale=0.7, density=0.5),
    "magnitude_max": lambda m, out, base, w: magnitude_max(m, out, base=base),
    "recall": lambda m, out, base, w: merge_with_recall(m, out, base=base, weights={"default": [x / sum(w) for x in w]}),
}  # fmt: skip


def wanted(rule, names, whole):
    """The average and the sum of task vectors, computed from whole models; None for other rules."""
    shares = [SHARES[n] for n in names]
    if rule in ("linear", "recall"):
        return {
            k: sum(s * whole[n][k] for s, n in zip(shares, names, strict=True)) / sum(shares) for k in whole["base"]
        }
    if rule == "task_arithmetic":
        zero = whole["base"]
        return {k: zero[k] + sum(s * (whole[n][k] - zero[k]) for s, n in zip(shares, names, strict=True)) for k in zero}
    return None


@pytest.mark.filterwarnings("ignore:base and base are the same weights")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("names", [("full", "one", "two"), ("full", "one"), ("base", "one"), ("one", "two")])
def test_every_order_gives_the_same_weights(world, tmp_path, rule, names):
    folders, whole = world
    first = None
    for i, order in enumerate(permutations(names)):
        out = tmp_path / str(i)
        RULES[rule]([folders[n] for n in order], out, folders["base"], [SHARES[n] for n in order])
        found = merged(out, folders["base"])
        target = first = first or wanted(rule, names, whole) or found
        for name, value in target.items():
            torch.testing.assert_close(found[name], value, atol=2e-6, rtol=2e-5, msg=lambda m: f"{order} {name}: {m}")


@pytest.mark.parametrize("tuned_name", ["full", "one"])
def test_interpolate_and_a_fusion_take_what_they_are_given(world, tmp_path, tuned_name):
    folders, whole = world
    interpolate(folders["base"], folders[tuned_name], tmp_path / "out", alpha=0.25)
    found, zero, end = merged(tmp_path / "out", folders["base"]), whole["base"], whole[tuned_name]
    for name in zero:
        torch.testing.assert_close(found[name], zero[name] + 0.25 * (end[name] - zero[name]))
    for order in permutations([folders["base"], folders["full"], folders["one"]]):
        with pytest.raises(ValueError, match="adapters only, or full models only|an adapter and|a full model"):
            kif_fuse(
                order[0], order[1], tmp_path / "no", old=order[2], importance=folders["full"] / "model.safetensors"
            )


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_adapters_of_other_bases_are_refused_in_every_order(world, tmp_path, order):
    """A folder and two ids: the ids contradict each other, whatever the folder's place."""
    folders, _ = world
    base, made = build(num_hidden_layers=1), []
    for i, named in enumerate(["/somewhere/base", "me/one", "me/two"]):
        made.append(adapter(base, tmp_path / f"a{i}", i))
        config = json.loads((made[-1] / "adapter_config.json").read_text())
        (made[-1] / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": named}))
    with pytest.raises(MergeError, match="trained on 'me/(one|two)'"):
        merge_linear([made[i] for i in order], tmp_path / "out", base=folders["base"])


@pytest.mark.parametrize("order", list(permutations(("short", "law", "tax"))))
def test_vocabularies_that_contradict_each_other_behind_the_shortest(tmp_path, order):
    for name, words in (("short", []), ("law", ["<law>"]), ("tax", ["<tax>"])):
        save(build(num_hidden_layers=1, vocab_size=len(toy.VOCABULARY) + len(words)), tmp_path / name)
        tokenizer = toy.tokenizer()
        tokenizer.add_tokens(words)
        tokenizer.save_pretrained(tmp_path / name)
    with pytest.raises(MergeError, match=r"id 64 is '<(law|tax)>' in one and '<(law|tax)>'"):
        merge_linear([tmp_path / n for n in order], tmp_path / "out", vocab="extend")
