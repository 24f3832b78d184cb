"""A folder in which the snippets run as typed: a tiny model in place of the real ones, and the files that they name."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

import hf_continual
from tests import toy

ROOT = Path(__file__).parents[2]
REAL = re.compile(
    r"(?<![\w/.])(?:Qwen/Qwen2\.5-0\.5B(?:-Instruct)?|HuggingFaceTB/SmolLM2-135M(?:-Instruct)?|me/other|MODEL)(?![\w/])"
)
SMALL = {
    "max_steps": 1, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no",
    "dataloader_pin_memory": False, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
    "per_device_train_batch_size": 4,
}  # fmt: skip
FLAGS = "--set save_strategy=no --set dataloader_pin_memory=false --set use_cpu=true --set bf16=false"


def rows(seed: int = 1, number: int = 12) -> Dataset:
    """Questions and answers."""
    return toy.rows("prompt_completion", number=number, seed=seed)


def build(folder: Path) -> None:
    """Write models and rows."""
    reader = toy.tokenizer()
    reader.add_tokens(["__gen__", "__ans__"])
    for seed, name in enumerate(("model", "law", "tax", "tickets", "seed-0", "seed-1")):
        toy.model(seed, vocab_size=len(reader)).save_pretrained(folder / name)
        reader.save_pretrained(folder / name)
    for seed, name in enumerate(
        (
            "new",
            "old",
            "mine",
            "old_tasks",
            "law.train",
            "law.test",
            "tickets.train",
            "tickets.test",
            "tickets",
            "agnews",
        )
    ):
        rows(seed, 24 if name == "old" else 12).to_json(folder / f"{name}.jsonl")
    toy.rows("text", number=8, seed=5).to_json(folder / "general.jsonl")
    shutil.copytree(ROOT / "recipes", folder / "recipes", dirs_exist_ok=True)


def in_small(text: str, folder: Path) -> str:
    """A snippet with the tiny model in place of a real one."""
    return REAL.sub(str(folder / "model"), text)


def small_line(line: str, folder: Path) -> str:
    """A command that trains one step, without ``hf-continual``."""
    line = in_small(line, folder).removeprefix("hf-continual ")
    if line.startswith("train ") and "--dry-run" not in line:
        steps = "" if "--steps" in line else "--steps 1"
        return f"{line} {steps} {FLAGS}"
    if line.startswith("run ") and "--dry-run" not in line:
        return f"{line} --set steps=1 " + " ".join(f"--set sft.{flag}" for flag in FLAGS.split("--set ")[1:])
    return f"{line} --prompt w1 --max-new-tokens 2" if line.startswith("chat ") else line


def small_plan(text: str, folder: Path) -> dict[str, Any]:
    """A plan of a page that trains one step a task."""
    plan = yaml.safe_load(in_small(text, folder))
    plan["sft"] = {**plan.get("sft", {}), **SMALL}
    plan["peft"] = {**plan.get("peft", {}), "r": 2}
    plan["evaluation"] = {"bootstrap": 20, "batch_size": 8}
    return plan


def names(folder: Path) -> dict[str, Any]:
    """What the snippets expect to have: rows, and a model."""
    from peft import LoraConfig, PromptTuningConfig

    given: dict[str, Any] = {
        n: rows(s) for s, n in enumerate(("new_task", "old_rows", "task", "first", "second", "law", "tax"))
    }
    found = {"model": str(folder / "model"), "base": str(folder / "model")}
    return given | found | {"LoraConfig": LoraConfig, "PromptTuningConfig": PromptTuningConfig}


def public() -> dict[str, Any]:
    """The public names, which pages do not import again in every block."""
    return {name: getattr(hf_continual, name) for name in hf_continual.__all__}


def smaller(real: Any) -> Any:
    """ContinualConfig, with one step and nothing written unless a snippet says otherwise."""
    return lambda *args, **options: real(*args, **{**SMALL, **options})
