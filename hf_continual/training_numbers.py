"""Find training arguments that would train nothing, or would fail only after the model was loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Name -> the lower bound, and whether the bound itself works.
_LEAST: dict[str, tuple[float, bool]] = {
    "learning_rate": (0, True),
    "weight_decay": (0, True),
    "max_grad_norm": (0, True),
    "per_device_train_batch_size": (1, True),
    "gradient_accumulation_steps": (1, True),
    "warmup_steps": (0, True),
    "save_steps": (0, False),
    "logging_steps": (0, False),
    "max_length": (1, True),
}


def check_numbers(options: Mapping[str, Any], trains: bool = True) -> tuple[str, str] | None:
    """Look for a number that cannot be intended.

    Args:
        options: Training arguments by name; those that are not given are not checked.
        trains: Whether they must also train something.

    Returns:
        Name of the argument and a sentence about it; None if all can be used.
    """
    for name, (least, included) in _LEAST.items():
        value = options.get(name)
        if value is None:
            continue
        number = _as_number(value)
        if number is None:
            return name, f"{name} is {value!r} ({type(value).__name__}), and it must be a number."
        value = number
        if not (value > least or (included and value == least)) or value == float("inf"):
            return name, f"{name} is {value!r}, and it must be {'at least' if included else 'above'} {least:g}."
    return _nothing_trained(options) if trains else None


def _as_number(value: Any) -> float | None:
    """The number, or the number that transformers reads from a text; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return value if isinstance(value, int | float) else None


def _nothing_trained(options: Mapping[str, Any]) -> tuple[str, str] | None:
    steps, epochs = options.get("max_steps", -1), options.get("num_train_epochs", 3)
    if not isinstance(steps, int) or isinstance(steps, bool):
        return "max_steps", f"max_steps is {steps!r} ({type(steps).__name__}), and it must be a whole number."
    if steps == 0 or steps < -1:
        return "max_steps", f"max_steps is {steps}: give the number of optimizer steps, or -1 to train by epochs."
    if steps == -1 and isinstance(epochs, int | float) and not epochs > 0:
        return (
            "num_train_epochs",
            f"num_train_epochs is {epochs!r}: nothing would be trained. Give more than 0, or max_steps.",
        )
    return None
