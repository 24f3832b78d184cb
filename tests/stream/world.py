"""Plans of a second on the toy world, as files: a model, three tasks, general text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM

from tests import toy

SFT = {
    "max_steps": 6, "learning_rate": 2e-2, "save_strategy": "steps", "save_steps": 2, "use_cpu": True, "bf16": False,
    "per_device_train_batch_size": 4, "logging_steps": 3, "gradient_checkpointing": False, "disable_tqdm": True,
    "logging_strategy": "no",
}  # fmt: skip


def make(folder: Path, **changes: Any) -> dict[str, Any]:
    """Write the world's files and return a plan of three tasks."""
    if not (folder / "model").is_dir():
        toy.model().save_pretrained(folder / "model")
        toy.tokenizer().save_pretrained(folder / "model")
        for i in range(3):
            toy.rows("prompt_completion", number=8, seed=i).to_json(folder / f"t{i}.jsonl")
        toy.rows("text", number=6, seed=9).to_json(folder / "general.jsonl")
    tasks = [
        {"name": f"t{i}", "train": str(folder / f"t{i}.jsonl"), "test": str(folder / f"t{i}.jsonl")} for i in range(3)
    ]
    return {
        "model": str(folder / "model"),
        "output_dir": str(folder / "out"),
        "sft": dict(SFT),
        "tasks": tasks,
        "evaluation": {"tasks": "all", "batch_size": 8, "bootstrap": 50},
        **changes,
    }


def write(folder: Path, plan: dict[str, Any]) -> Path:
    """A plan as a file."""
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump(plan, sort_keys=False), encoding="utf-8")
    return file


def weights(folder: Path) -> torch.Tensor:
    """All weights in a task's folder."""
    return toy.flat(AutoModelForCausalLM.from_pretrained(folder))


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter."""
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")
