"""Weights to stay near are identified by their values, not by their path or an adapter's name."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import Parameter
from transformers import AutoModelForCausalLM

from hf_continual import ContinualConfig, ContinualTrainer, RecAdam
from hf_continual.tensors.anchors import is_lasting, read_named
from tests import toy


def recall(**options):
    return RecAdam(anneal="none", pull=0.05, **options)


def train(model, folder, steps, method=None, resume=None):
    settings = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
    trainer = ContinualTrainer(
        str(model) if not isinstance(model, torch.nn.Module) else model,
        ContinualConfig(**toy.settings(folder, max_steps=steps, **settings)),
        train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
        methods=[method or recall()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def base(folder, seed=0):
    toy.model(seed).save_pretrained(folder)
    return folder


def record(checkpoint):
    return json.loads((checkpoint / "continual" / "recadam.json").read_text())


def test_a_base_that_moved_is_found_with_the_model(tmp_path):
    old = base(tmp_path / "old")
    straight = train(old, tmp_path / "a", 4)
    train(old, tmp_path / "b", 2)
    assert record(tmp_path / "b" / "checkpoint-2")["base"] == str(old)
    new = old.rename(tmp_path / "new")
    resumed = train(new, tmp_path / "b", 4, resume=True)
    assert torch.equal(toy.flat(straight.model), toy.flat(resumed.model))
    assert record(tmp_path / "b" / "checkpoint-4")["base"] == str(new)
    shutil.rmtree(new)
    with pytest.raises(ValueError, match=r"none of the places .* has them: \(1\) .*'.*new'.*\(2\) .*fingerprint"):
        train(base(tmp_path / "other", seed=5), tmp_path / "b", 6, resume=True)


@pytest.mark.parametrize("start", ["out/checkpoint-9", "elsewhere/checkpoint-9", "out"])
def test_a_base_that_will_not_last_is_stored(tmp_path, start):
    folder = base(tmp_path / start)
    train(folder, tmp_path / "out", 2)
    assert record(tmp_path / "out" / "checkpoint-2") == {"stored": True}
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert (
        train(toy.model(3), tmp_path / "out", 4, resume=str(tmp_path / "out" / "checkpoint-2")).state.global_step == 4
    )


def test_what_lasts(tmp_path):
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "checkpoints").mkdir()
    assert is_lasting("someone/model", tmp_path / "out") and is_lasting(str(tmp_path / "checkpoints"), tmp_path / "out")
    assert is_lasting(str(tmp_path), tmp_path / "out")
    assert not is_lasting(str(tmp_path / "out"), tmp_path / "out")
    assert not is_lasting(str(tmp_path / "out" / "checkpoint-3"), None)


def test_a_base_that_is_written_over_during_the_run_is_stored_from_then_on(tmp_path, caplog, monkeypatch):
    folder = base(tmp_path / "base")
    train(folder, tmp_path / "out", 2)

    state_dict = RecAdam.state_dict

    def overwrite(self, run):
        if run.step == 4:
            base(folder, seed=7)
        return state_dict(self, run)

    with caplog.at_level(logging.WARNING, "hf_continual"), monkeypatch.context() as patched:
        patched.setattr(RecAdam, "state_dict", overwrite)
        straight = train(folder, tmp_path / "out", 6, recall(), resume=True)
    assert "was overwritten; the anchors are stored" in caplog.text
    resumed = train(folder, tmp_path / "out", 6, resume=str(tmp_path / "out" / "checkpoint-4"))
    assert torch.equal(toy.flat(straight.model), toy.flat(resumed.model))


def test_a_checkpoint_without_its_optimizer_is_called_that(tmp_path):
    folder = base(tmp_path / "base")
    train(folder, tmp_path / "out", 2)
    (tmp_path / "out" / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(Exception, match=r"optimizer\.pt"):
        train(folder, tmp_path / "out", 4, resume=str(tmp_path / "out" / "checkpoint-2"))


def test_named_anchors_are_needed_no_more_once_a_checkpoint_has_them(tmp_path):
    near = base(tmp_path / "near", seed=4)
    straight = train(toy.model(), tmp_path / "a", 4, recall(anchor=str(near)))
    train(toy.model(), tmp_path / "b", 2, recall(anchor=str(near)))
    shutil.rmtree(near)
    resumed = train(
        toy.model(), tmp_path / "b", 4, recall(anchor=str(near)), resume=str(tmp_path / "b" / "checkpoint-2")
    )
    assert torch.equal(toy.flat(straight.model), toy.flat(resumed.model))
    base(near, seed=6)
    with pytest.raises(ValueError, match="holds a different .* than the run to resume stayed near"):
        train(toy.model(), tmp_path / "b", 6, recall(anchor=str(near)), resume=str(tmp_path / "b" / "checkpoint-4"))


# --- names of adapters

ADAPTERS = {
    "linear": {"target_modules": ["q_proj", "down_proj"]},
    "modules to save": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "magnitudes": {"target_modules": ["v_proj"], "use_dora": True},
    "bias": {"target_modules": ["v_proj"], "lora_bias": True},
    "tokens": {"target_modules": ["v_proj"], "trainable_token_indices": [3, 5]},
}


def scrambled(model):
    g = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g))
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["default", "law", "lora_A", "v2_1", "weight"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_any_kind_and_name(tmp_path, kind, name):
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", **ADAPTERS[kind])
    model = scrambled(get_peft_model(toy.model(), lora, adapter_name=name))
    model.save_pretrained(tmp_path)
    wanted = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    other = get_peft_model(toy.model(), lora, adapter_name=name)
    found = read_named(str(tmp_path), None, {n: p for n, p in other.named_parameters() if p.requires_grad}, other)
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], t) for n, t in wanted.items())


def test_several_adapters_have_a_folder_each(tmp_path):
    lora = LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(toy.model(), lora, adapter_name="law")
    model.add_adapter("medicine", lora)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    scrambled(model).save_pretrained(tmp_path)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 16
    found = read_named(str(tmp_path), None, trained, model)
    assert all(torch.equal(found[n], p) for n, p in trained.items())
    with pytest.raises(ValueError, match=r"holds one adapter, and the run trains several: law, medicine"):
        read_named(str(tmp_path / "law"), None, trained, model)


def test_an_adapter_that_has_a_name_trains_near_its_folder(tmp_path):
    lora = LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM")
    scrambled(get_peft_model(toy.model(), lora, adapter_name="law")).save_pretrained(tmp_path / "adapters")
    base(tmp_path / "base")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapters" / "law", "law", is_trainable=True
    )
    train(model, tmp_path / "out", 2, recall(anchor=str(tmp_path / "adapters")))


def test_an_index_cannot_lead_out_of_the_folder(tmp_path):
    (tmp_path / "model").mkdir()
    save_file({"secret": torch.ones(2)}, tmp_path / "private.safetensors")
    index = {"metadata": {}, "weight_map": {"secret": "../private.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"says that 'secret' is in '\.\./private"):
        read_named(str(tmp_path / "model"), None, {"secret": Parameter(torch.ones(2))}, toy.model())
    assert load_file(tmp_path / "private.safetensors")
