"""Without methods ContinualTrainer is SFTTrainer: weights, logs and checkpoints bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer

from hf_continual import ContinualConfig, ContinualTrainer
from tests import toy

LAYOUTS = {
    "padded": ("text", {}),
    "packed-bfd": ("text", {"packing": True, "max_length": 32}),
    "packed-wrapped": ("text", {"packing": True, "max_length": 32, "packing_strategy": "wrapped"}),
    "padding-free": ("text", {"padding_free": True, "max_length": None}),
    "completion-only": ("prompt_completion", {}),
    "assistant-only": ("messages", {"assistant_only_loss": True}),
}


def lora():
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)


def train(trainer_class, config_class, folder, kind, peft, **settings):
    trainer = trainer_class(
        toy.model(),
        config_class(**toy.settings(folder, max_steps=3, save_strategy="steps", save_steps=3, **settings)),
        train_dataset=toy.rows(kind),
        processing_class=toy.tokenizer(),
        peft_config=lora() if peft else None,
    )
    trainer.train()
    return trainer


def same_checkpoints(one, two):
    names = [sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) for folder in (one, two)]
    assert names[0] == names[1]
    for name in names[0]:
        a, b = one / name, two / name
        if name.endswith(".safetensors"):
            left, right = load_file(a), load_file(b)
            assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left), name
        elif name.endswith(".pt") and "optimizer" in name:
            left, right = (torch.load(x, weights_only=True)["state"] for x in (a, b))
            for i, state in left.items():
                assert all(torch.equal(v, right[i][k]) for k, v in state.items()), name
        elif name.endswith("trainer_state.json"):
            left, right = (json.loads(x.read_text()) for x in (a, b))
            assert left["log_history"] == right["log_history"] and left.keys() == right.keys()
        elif "training_args" not in name and not name.endswith(("rng_state.pth", ".pt", "README.md")):
            assert a.read_bytes() == b.read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_bit_for_bit(tmp_path, peft, layout, accumulation, checkpointing):
    kind, settings = LAYOUTS[layout]
    settings = {
        **settings,
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": checkpointing,
    }
    plain = train(SFTTrainer, SFTConfig, tmp_path / "sft", kind, peft, **settings)
    ours = train(ContinualTrainer, SFTConfig, tmp_path / "continual", kind, peft, **settings)
    assert torch.equal(toy.flat(plain.model), toy.flat(ours.model))
    assert toy.logs(plain) == toy.logs(ours)
    same_checkpoints(tmp_path / "sft" / "checkpoint-3", tmp_path / "continual" / "checkpoint-3")


def test_the_configuration_changes_nothing_either(tmp_path):
    plain = train(SFTTrainer, SFTConfig, tmp_path / "sft", "text", False)
    ours = train(ContinualTrainer, ContinualConfig, tmp_path / "continual", "text", False)
    assert torch.equal(toy.flat(plain.model), toy.flat(ours.model))
    assert toy.logs(plain) == toy.logs(ours)
    settings = toy.settings(tmp_path)
    extra = ContinualConfig(**settings).to_dict().keys() - SFTConfig(**settings).to_dict().keys()
    own = {"methods", "task_name", "task_index", "predecessor", "from_adapter", "fresh_methods", "max_minutes"}
    gauges = {"gauges", "stop_if", "rollback_if", "keep_best", "stop_when"}
    assert extra == own | gauges | {"hub_base_model", "hub_license"}


def test_nothing_is_attached_without_methods(tmp_path):
    trainer = ContinualTrainer(
        toy.model(),
        SFTConfig(**toy.settings(tmp_path)),
        train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
        methods=[],
    )
    assert trainer.mixer is None and trainer.tap is None
    assert not [c for c in trainer.callback_handler.callbacks if "hf_continual" in type(c).__module__]
    assert not any(module._forward_hooks for module in trainer.model.modules())
    assert "hf_continual" not in type(trainer.data_collator).__module__
