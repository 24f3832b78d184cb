"""An optimizer must hold all trained weights: model surgery can leave behind one that was built before it."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_continual import KIF, ContinualConfig, ContinualTrainer, FreezeLayers
from hf_continual.methods.base import Method
from hf_continual.paper import Paper
from tests import toy


def build(folder, model, *methods, optimizer=None, **arguments):
    return ContinualTrainer(
        model,
        ContinualConfig(**toy.settings(folder, max_steps=2)),
        train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
        optimizers=(optimizer, None),
        methods=methods,
        **arguments,
    )


def test_a_head_untied_after_the_optimizer_was_built(tmp_path):
    def method():
        return FreezeLayers(bottom=1, embeddings="untie")

    model = toy.model(tie_word_embeddings=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"The optimizer .SGD. lacks 1 of \d+ .*lm_head.weight.*optimizer_cls_and_kwargs"
    ):
        build(tmp_path, model, method(), optimizer=optimizer)
    # The message's advice.
    model = toy.model(tie_word_embeddings=True)
    trainer = build(tmp_path, model, method(), optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}))
    before = model.lm_head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, model.lm_head.weight)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_head_whose_copy_the_adapter_ties(tmp_path):
    def make(modules, **options):
        lora = LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=modules, **options)
        method = FreezeLayers(bottom=1, embeddings="untie")
        return build(tmp_path, toy.model(tie_word_embeddings=True), method, peft_config=lora)

    with pytest.raises(ValueError, match=r"cannot untie .*ensure_weight_tying.*modules_to_save=\['lm_head'\]"):
        make(["embed_tokens"], ensure_weight_tying=True)
    trainer = make(["lm_head"])
    head = trainer.model.get_output_embeddings().modules_to_save["default"].weight
    before = head.detach().clone()
    trainer.train()
    assert not torch.equal(before, head)


def test_an_adapter_made_after_the_optimizer(tmp_path):
    model = toy.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match=r"lacks 16 of 16 trainable parameters, such as .*lora_A"):
        build(tmp_path, model, KIF(toy.rows()), optimizer=optimizer, peft_config=LoraConfig(r=2))


class Late(Method):
    """Gives the model a trainable matrix when everything is wrapped."""

    name, paper = "late", Paper("x", "y", 2020)

    def begin_task(self, run):
        run.model.model.layers[0].extra = nn.Linear(2, 2)


def test_surgery_when_training_starts(tmp_path):
    trainer = build(tmp_path, toy.model(), Late())
    with pytest.raises(ValueError, match=r"lacks 2 of 41 .*layers.0.extra.weight"):
        trainer.train()


def test_a_layer_unfrozen_between_construction_and_training(tmp_path):
    model = toy.model()
    model.model.norm.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    trainer = build(tmp_path, model, Method_(), optimizer=optimizer)
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="model.norm.weight"):
        trainer.train()
    model.model.norm.weight.requires_grad_(False)
    trainer.train()  # the other advice: freeze what should not be trained


class Method_(Method):
    name, paper = "nothing", Paper("x", "y", 2020)


def test_parameters_that_left_the_model_are_logged(tmp_path, caplog):
    """Adapters below the cut are removed; an optimizer that holds them still works."""
    model = get_peft_model(toy.model(), LoraConfig(r=2, target_modules=["q_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with caplog.at_level(logging.WARNING, "hf_continual"):
        trainer = build(tmp_path, model, FreezeLayers(bottom=2), optimizer=optimizer)
    assert "4 parameters of the optimizer (AdamW) are not, or no longer, part of the model" in caplog.text
    trainer.train()


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
def test_optimizers_of_the_trainer_hold_what_is_trained(tmp_path, optim):
    trainer = ContinualTrainer(
        toy.model(tie_word_embeddings=True),
        ContinualConfig(**toy.settings(tmp_path, max_steps=1, optim=optim)),
        train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
        methods=[FreezeLayers(bottom=1, embeddings="untie")],
    )
    trainer.train()
    assert trainer.state.global_step == 1
