"""Runs of transformers' own Trainer, with methods in each of the ways; also `python -m tests.neighbours.world` under torchrun.

Nothing here imports TRL: the same file runs where it is missing or too old.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from hf_continual import EWC, MIGU, ContinualCallback, ContinualMixin, FreezeLayers, OLoRA, RecAdam
from tests import toy


class Mixed(ContinualMixin, Trainer):
    """As a user writes it."""


def rows(seed: int = 1) -> Dataset:
    """Tokenised rows of different lengths."""
    tokenizer = toy.tokenizer()
    ids = [tokenizer(text).input_ids for text in toy.rows(seed=seed)["text"]]
    return Dataset.from_list([{"input_ids": i, "labels": i, "attention_mask": [1] * len(i)} for i in ids])


def adapted(seed: int = 0) -> Any:
    """The toy with an adapter on every linear layer."""
    base = toy.model(seed)
    return get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


def build(
    folder: Path | str, methods: Any = None, way: str = "callback", model: Any = None, seed: int = 1, **settings: Any
) -> Any:
    """A trainer of four steps; `methods=None` is Trainer as it is."""
    options = {k: settings.pop(k) for k in ("task_name", "task_index", "predecessor", "fresh_methods") if k in settings}
    given = {
        "model": toy.model() if model is None else model,
        "args": TrainingArguments(**toy.settings(folder, **settings)),
        "train_dataset": rows(seed),
        "data_collator": DataCollatorForSeq2Seq(toy.tokenizer()),
        "processing_class": toy.tokenizer(),
    }
    if methods is None:
        return Trainer(**given)
    if way == "mixin":
        return Mixed(**given, methods=methods, **options)
    callback = ContinualCallback(methods, **options)
    return callback.attach(Trainer(**given)) if way == "attach" else Trainer(**given, callbacks=[callback])


def learn(folder: Path | str, methods: Any = None, resume: Any = None, **settings: Any) -> Any:
    """Train and save."""
    trainer = build(folder, methods, **settings)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer


def resumed_is_straight(folder: Path, methods: Any, model: Any, **settings: Any) -> Any:
    """Train, resume from the middle, and compare weights and what is left; returns the straight run."""
    settings = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, **settings}
    straight = learn(folder / "run", methods(), model=model(), **settings)
    assert not torch.equal(toy.flat(straight.model), toy.flat(model()))
    resumed = learn(folder / "run", methods(), model=model(), resume=str(folder / "run" / "checkpoint-2"), **settings)
    assert torch.equal(toy.flat(straight.model), toy.flat(resumed.model))
    assert straight.task_states.keys() == resumed.task_states.keys()
    for name, state in straight.task_states.items():
        for key, value in state.items():
            again = resumed.task_states[name][key]
            assert torch.equal(value, again) if torch.is_tensor(value) else value == again
    return straight


def together() -> list[Any]:
    """All four at once, on all weights."""
    return [
        FreezeLayers(bottom=1),
        EWC(weight=1e5),
        MIGU(share=0.3, first_task=True),
        RecAdam(anneal="none", pull=0.05),
    ]


def adapter() -> list[Any]:
    """Three, on an adapter."""
    return [EWC(weight=1e5), OLoRA(weight=0.5), MIGU(share=0.3, mask_a=True)]


if __name__ == "__main__":
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    settings = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2, "model": None}
    start = sys.argv[2]
    from transformers import AutoModelForCausalLM

    found = {}
    for name, resume in (("straight", None), ("resumed", str(place / "checkpoint-2"))):
        settings["model"] = AutoModelForCausalLM.from_pretrained(start)
        trainer = learn(place, together(), seed=5, resume=resume, **settings)
        found[name] = toy.flat(trainer.accelerator.unwrap_model(trainer.model))
    if int(os.environ["RANK"]) == 0:
        torch.save(found, place / "result.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
