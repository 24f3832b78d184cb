"""What adapters hold besides their products: heads and embeddings, tied and untied, with new tokens; classifiers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_continual import interpolate, merge_linear
from hf_continual.merging.errors import MergeError
from tests import toy
from tests.merging.world import adapter, build, cells, logits, save

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LONGER = len(toy.VOCABULARY) + 5
IDS = torch.arange(LONGER - 12, LONGER)[None]


def said(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def trained(base, folder, seed=1, rows=None, auto=AutoModelForCausalLM, name="default", **config):
    """An adapter on a model read from a folder, all of its parts random, as PEFT saves it; the live model."""
    torch.manual_seed(seed)
    model = auto.from_pretrained(base)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    live = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 5, **config}), adapter_name=name)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    live.save_pretrained(folder)
    return live


HEADS = {
    "head": {"target_modules": ["v_proj", "lm_head"]},
    "head alone": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "head, embedding saved": {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]},
    "embedding, head saved": {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
    "kept tied": {"target_modules": ["v_proj", "lm_head"], "ensure_weight_tying": True},
    "dora": {"target_modules": ["lm_head"], "use_dora": True},
}


@pytest.mark.parametrize(("form", "family", "rows"), cells(HEADS, ["llama tied", "gpt2"], [None, LONGER]))
def test_an_adapter_of_a_tied_head(tmp_path, form, family, rows):
    config = HEADS[form]
    if family == "gpt2":
        if "ensure_weight_tying" in config:
            pytest.skip("PEFT itself does not load GPT-2's head again")
        names = {"v_proj": "c_attn", "embed_tokens": "wte", "lm_head": "lm_head"}
        config = {k: [names[n] for n in v] if isinstance(v, list) else v for k, v in config.items()}
    save(build(family), tmp_path / "base")
    live = trained(tmp_path / "base", tmp_path / "a", rows=rows, **config)
    merge_linear([tmp_path / "a"], tmp_path / "out", base=tmp_path / "base", output="model")
    ids = torch.arange(4, 20)[None] if rows is None else IDS
    torch.testing.assert_close(
        said(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), ids), said(live, ids), rtol=0, atol=1e-5
    )


TOKENS = {
    "both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "products": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "product on the embedding": {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    "nothing of the embedding": {"target_modules": ["q_proj"]},
}


@pytest.mark.parametrize(("form", "family"), cells(TOKENS, ["llama", "llama tied"]))
def test_new_tokens(tmp_path, form, family):
    save(build(family), tmp_path / "base")
    live = trained(tmp_path / "base", tmp_path / "a", rows=LONGER, **TOKENS[form])
    merge_linear([tmp_path / "a"], tmp_path / "one", base=tmp_path / "base", output="model")
    interpolate(tmp_path / "base", tmp_path / "a", tmp_path / "two", alpha=1.0, output="model", vocab="extend")
    for out in ("one", "two"):
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / out)
        assert merged.config.vocab_size == LONGER
        torch.testing.assert_close(said(merged, IDS), said(live, IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "llama tied"])
def test_two_adapters_with_new_tokens_as_an_adapter(tmp_path, family):
    save(build(family), tmp_path / "base")
    for seed in (1, 2):
        trained(tmp_path / "base", tmp_path / f"a{seed}", seed, rows=LONGER, **TOKENS["both"])
    inputs = [tmp_path / "a1", tmp_path / "a2"]
    merge_linear(inputs, tmp_path / "model", base=tmp_path / "base", output="model")
    assert merge_linear(inputs, tmp_path / "out", base=tmp_path / "base").kind == "adapter"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(LONGER, mean_resizing=False)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    wanted = said(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), IDS)
    torch.testing.assert_close(said(loaded, IDS), wanted, rtol=0, atol=1e-5)


def test_a_longer_embedding_without_its_head_is_refused_and_the_resized_base_taken(tmp_path):
    """As PEFT saves it if it cannot see the base's configuration."""
    save(build(), tmp_path / "base")
    live = trained(tmp_path / "base", tmp_path / "a", rows=LONGER, **TOKENS["embedding"])
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for name in list(stored):
        if "lm_head" in name or "original_module" in name:
            del stored[name]
    save_file(stored, tmp_path / "a" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(
        MergeError, match=rf"has 'model.embed_tokens.weight' with {LONGER} rows but no 'lm_head.weight'"
    ):
        merge_linear([tmp_path / "a"], tmp_path / "out", base=tmp_path / "base", output="model")
    torch.manual_seed(1)  # the resizing of `trained`
    resized = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    resized.resize_token_embeddings(LONGER, mean_resizing=False)
    save(resized, tmp_path / "resized")
    merge_linear([tmp_path / "a"], tmp_path / "out", base=tmp_path / "resized", output="model")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(said(merged, IDS), said(live, IDS), rtol=0, atol=1e-5)


def test_a_saved_module_of_another_shape(tmp_path):
    save(build(), tmp_path / "base")
    trained(tmp_path / "base", tmp_path / "a", target_modules=["q_proj"], modules_to_save=["norm"])
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    name = next(n for n in stored if n.endswith("model.norm.weight"))
    save_file({**stored, name: torch.ones(7)}, tmp_path / "a" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(MergeError, match=r"a has 'model.norm.weight' as \[7\], but it is \[32\] in base"):
        merge_linear([tmp_path / "a"], tmp_path / "out", base=tmp_path / "base", output="model")


def test_a_saved_module_that_no_base_has_is_not_missed(tmp_path):
    save(build(), tmp_path / "base")
    live = trained(tmp_path / "base", tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head", "wte"])
    merge_linear([tmp_path / "a"], tmp_path / "out", base=tmp_path / "base", output="model")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(live))


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_a_classifiers_adapter(tmp_path, task):
    """Refused on a language model; the message's advice works: models with the head, or such a base."""
    auto = AutoModelForSequenceClassification
    save(build(), tmp_path / "base")
    config = {"target_modules": ["q_proj"], "task_type": task, "modules_to_save": None if task else ["score"]}
    live = trained(tmp_path / "base", tmp_path / "a", auto=auto, **config)
    for output in ("model", None):
        with pytest.raises(MergeError, match=r"a .*LlamaForCausalLM.*merge_and_unload") as error:
            merge_linear([tmp_path / "a"], tmp_path / "out", base=tmp_path / "base", output=output)
        assert (
            "classifier" in str(error.value)
            and "incomplete" not in str(error.value)
            and "another base" not in str(error.value)
        )
    whole = PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), tmp_path / "a")
    save(whole.merge_and_unload(), tmp_path / "whole")
    merge_linear([tmp_path / "whole"], tmp_path / "one", base=tmp_path / "base")
    save(auto.from_pretrained(tmp_path / "base"), tmp_path / "classifier")
    merge_linear([tmp_path / "a"], tmp_path / "two", base=tmp_path / "classifier", output="model")
    ids = torch.arange(4, 20)[None]
    for out in ("one", "two"):
        torch.testing.assert_close(said(auto.from_pretrained(tmp_path / out), ids), said(live, ids), rtol=0, atol=1e-5)


def test_a_classifiers_adapter_without_its_head(tmp_path):
    base = build()
    save(base, tmp_path / "base")
    folder = adapter(base, tmp_path / "a", 1)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": "TOKEN_CLS"}))
    with pytest.raises(
        MergeError, match=r"classifier's adapter \(task_type='TOKEN_CLS'\).*AutoModelForTokenClassification"
    ):
        merge_linear([folder], tmp_path / "out", base=tmp_path / "base")


@pytest.mark.parametrize("names", [["law"], ["law", "tax"], ["checkpoint-5", "checkpoint-10"]])
def test_an_adapter_below_the_folder_that_was_given_is_named(tmp_path, names):
    base = build()
    save(base, tmp_path / "base")
    adapter(base, tmp_path / "plain", 1)
    for name in names:
        shutil.copytree(tmp_path / "plain", tmp_path / "a" / name)
    given = {"base": tmp_path / "base"}
    with pytest.raises(
        FileNotFoundError, match=r"it is neither a model nor an adapter\. There is an adapter below"
    ) as error:
        merge_linear([tmp_path / "a"], tmp_path / "out", **given)
    assert all(str(tmp_path / "a" / name) in str(error.value) for name in names)
    advised = str(error.value).partition("give ")[2].rstrip(".")
    assert advised == str(tmp_path / "a" / names[-1])
    merge_linear([advised], tmp_path / "out", **given)


def test_adapters_beside_the_one_that_is_read_are_mentioned(tmp_path):
    """PEFT saves the one that is called default in the folder itself, and the others below it."""
    save(build(), tmp_path / "base")
    live = trained(tmp_path / "base", tmp_path / "first", target_modules=["q_proj"])
    live.add_adapter("tax", LoraConfig(r=2, target_modules=["q_proj"]))
    live.save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a" / "tax", tmp_path / "a" / "checkpoint-5")
    notes = merge_linear([tmp_path / "a"], tmp_path / "out", base=tmp_path / "base").report["notes"]
    assert [
        n for n in notes if "also holds adapters in tax, which were not read" in n and str(tmp_path / "a" / "tax") in n
    ]
