"""Runs in which every pair of methods meets at least once, and the starting point of a run with given methods."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from hf_continual import ContinualConfig, ContinualTrainer
from hf_continual.methods.compose import overrides
from hf_continual.methods.table import TABLE, method_class
from tests import toy


def module(name: str) -> Any:
    """The test file of a method."""
    return importlib.import_module(f"tests.methods.test_{name}")


def example(name: str) -> Any:
    """The method of a test file, not named like its kind: nothing may find a method by its kind's name."""
    return renamed(module(name).example(None))


def zero(name: str) -> Any:
    """The method of a test file at zero strength, not named like its kind."""
    return renamed(module(name).zero(None))


def renamed(method: Any) -> Any:
    """A method under another name, if it can have one."""
    named = "name" in {f.name for f in dataclasses.fields(method)}
    return dataclasses.replace(method, name=f"my_{method.name}") if named else method


def adapters_only(names: Sequence[str]) -> bool:
    """Whether one of the methods works on LoRA adapters only."""
    return any(getattr(module(name), "ADAPTERS_ONLY", False) for name in names)


def own_modules(names: Sequence[str]) -> bool:
    """Whether one of the methods brings the modules that are trained, in place of an adapter or all weights."""
    return any(overrides(method_class(name), "adapter") for name in names)


def choose_by_row(names: Sequence[str]) -> bool:
    """Whether modules that one of the methods brings choose for a row as a whole, so that rows cannot be packed."""
    return any(getattr(module(n).example(None).adapter(), "chooses_by_row", False) for n in names)


def continues(names: Sequence[str]) -> bool:
    """Whether the methods work on an adapter that all tasks train, and not on a new one for each task."""
    return all(getattr(module(name), "CONTINUES", False) for name in names)


def allowed(names: Sequence[str]) -> bool:
    """Whether methods can be in one run: at most one supplies an optimizer, or modules in place of weights that others need."""
    one_each = all(sum(overrides(method_class(n), call) for n in names) <= 1 for call in ("optimizer", "adapter"))
    layers = adapters_only(names) or any(getattr(module(n), "LINEAR_ONLY", False) for n in names)
    return one_each and not (own_modules(names) and layers)


def pairs() -> list[tuple[str, str]]:
    """Every pair of the table that can be in one run."""
    return [pair for pair in itertools.combinations(TABLE, 2) if allowed(pair)]


def groups(size: int = 5) -> list[tuple[str, ...]]:
    """Few groups of at most `size` methods that hold every pair: each is filled with the method that adds most new pairs."""
    missing = {frozenset(pair) for pair in pairs()}
    found = []
    while missing:
        group = list(next(pair for pair in pairs() if frozenset(pair) in missing))
        while len(group) < size:
            news = {
                name: sum(frozenset((name, other)) in missing for other in group)
                for name in TABLE
                if name not in group and allowed([*group, name])
            }
            best = max(news, key=news.__getitem__, default=None)
            if best is None or not news[best]:
                break
            group.append(best)
        missing -= {frozenset(pair) for pair in itertools.combinations(group, 2)}
        found.append(tuple(name for name in TABLE if name in group))
    return found


def lora(rank: int = 2) -> LoraConfig:
    """An adapter on every linear layer."""
    return LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")


@functools.cache
def first_task(names: tuple[str, ...], peft: bool) -> Path:
    """Folder of a model that learned a first task with these methods."""
    folder = Path(tempfile.mkdtemp(prefix="first-task-"))
    toy.model().save_pretrained(folder / "base")
    trainer = ContinualTrainer(
        str(folder / "base"), ContinualConfig(**toy.settings(folder / "task", max_steps=3)),
        train_dataset=toy.rows(seed=4), processing_class=toy.tokenizer(), peft_config=lora() if peft else None,
        methods=[example(name) for name in names],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return folder / "task"


def start(names: Sequence[str], peft: bool = False) -> dict[str, Any]:
    """`model` and `peft_config` of a run: the toy, or a model that learned an earlier task if a method needs one."""
    peft = (peft or adapters_only(names)) and not own_modules(names)
    needy = tuple(name for name in names if getattr(module(name), "NEEDS_PREDECESSOR", False))
    model = str(first_task(needy, peft)) if needy else toy.model()
    return {"model": model, "peft_config": lora() if peft and not (needy and continues(names)) else None}


def plain_start(names: Sequence[str]) -> dict[str, Any]:
    """`start` for SFTTrainer, which does not open an adapter's folder to train it further."""
    given = start(names)
    if continues(names):
        base = AutoModelForCausalLM.from_pretrained(Path(given["model"]).parent / "base")
        given["model"] = PeftModel.from_pretrained(base, given["model"], is_trainable=True)
    return given
