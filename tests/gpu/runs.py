"""Trainings on a device: toy sizes on the CPU, sizes that fill the kernels on a card."""

from __future__ import annotations

from typing import Any

from trl import SFTConfig, SFTTrainer

from hf_continual import ContinualTrainer
from tests import toy

PRECISION = {
    "fp32": {"bf16": False, "fp16": False},
    "bf16": {"bf16": True, "fp16": False},
    "fp16": {"bf16": False, "fp16": True},
}
SIZE = {"cpu": {}, "cuda": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}}


def settings(folder: Any, device: str, precision: str = "fp32", **changes: Any) -> dict[str, Any]:
    """Training arguments for a device and a precision."""
    return toy.settings(folder, use_cpu=device == "cpu", **{**PRECISION[precision], **changes})


def build(trainer_class: type, folder: Any, device: str, *methods: Any, **given: Any) -> Any:
    """A trainer of the toy model.

    Args:
        trainer_class: SFTTrainer or ContinualTrainer.
        folder: The output folder.
        device: ``cpu`` or ``cuda``.
        *methods: Methods, for ContinualTrainer.
        **given: `precision`, `model`, `peft`, `rows`, and training arguments.

    Returns:
        The trainer.
    """
    model = given.pop("model", None) or toy.model(**SIZE[device], **given.pop("config", {}))
    peft, rows = given.pop("peft", None), given.pop("rows", None)
    more = {"methods": list(methods)} if trainer_class is ContinualTrainer else {}
    return trainer_class(
        model, SFTConfig(**settings(folder, device, **given)), train_dataset=rows or toy.rows(),
        processing_class=toy.tokenizer(), peft_config=peft, **more,
    )  # fmt: skip


def trained(*arguments: Any, **given: Any) -> Any:
    """A trainer that has trained."""
    made = build(*arguments, **given)
    made.train()
    return made


def pair(folder: Any, device: str, **given: Any) -> tuple[Any, Any]:
    """SFTTrainer and ContinualTrainer without methods, trained alike."""
    return (
        trained(SFTTrainer, folder / "sft", device, **dict(given)),
        trained(ContinualTrainer, folder / "ours", device, **dict(given)),
    )
