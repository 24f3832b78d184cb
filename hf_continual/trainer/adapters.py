"""Training that starts from an adapter: continued, or with a new one stacked on top of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel

from hf_continual.tensors.concatenate import concatenate_adapters

ADAPTER = "adapter_config.json"
EARLIER = "earlier"
PARTS, STACKED = ".parts", ".stacked"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and not a whole model."""
    return (folder / ADAPTER).is_file()


def adapter_on(base: Any, folder: Path, **options: Any) -> PeftModel:
    """The adapter of a folder on a base model.

    Args:
        base: The base model, wherever it was loaded from.
        folder: Folder of the adapter.
        **options: As `PeftModel.from_pretrained` takes them.

    Returns:
        The model with the adapter.
    """
    config = PeftConfig.from_pretrained(str(folder))
    # Where the base was when the adapter was trained; it may have moved since, and PEFT looks into it.
    config.base_model_name_or_path = base.name_or_path
    return PeftModel.from_pretrained(base, folder, config=config, **options)


def stacked(model: PeftModel, folder: Path, config: PeftConfig) -> PeftModel:
    """A new adapter, which is trained, on top of an earlier one, which is frozen.

    Args:
        model: A model whose adapter is called `EARLIER`.
        folder: Where that came from.
        config: The new adapter.

    Returns:
        The model.

    Raises:
        ValueError: If the new adapter is not LoRA, which alone can be saved as one with the earlier.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"a {type(config).__name__} cannot be put on top of the adapter in {folder}: only LoRA adapters can be saved as "
            f"one. Give peft_config=LoraConfig(...), or merge the adapter into its base first (merge_and_unload)."
        )
    model.add_adapter("default", config)
    activate_both(model)
    return model


def activate_both(model: Any) -> None:
    """Both act in the forward pass; only the new one learns."""
    model.base_model.set_adapter(["default", EARLIER])
    for name, parameter in model.named_parameters():
        if f".{EARLIER}." in name:
            parameter.requires_grad_(False)


@contextmanager
def kept_active(model: Any) -> Iterator[None]:
    """While a checkpoint is loaded: everything but the values stays as it is.

    transformers 5.23 leaves one adapter active, all of it trainable, and in float32 where 4 bits had made it bfloat16.
    """
    before = {name: (p.requires_grad, p.dtype) for name, p in model.named_parameters()}
    yield
    if is_stacked(model):
        activate_both(model)
    for name, parameter in model.named_parameters():
        trained, dtype = before[name]
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(trained)


def is_stacked(model: Any) -> bool:
    """Whether a model has an earlier adapter beneath the one that is trained."""
    return isinstance(model, PeftModel) and {EARLIER, "default"} <= set(model.peft_config)


def join(folder: Path) -> None:
    """Make one adapter of the two that were saved in ``folder/.parts``, exactly, and put it into the folder.

    Args:
        folder: The model's folder.
    """
    parts, joined = folder / PARTS, folder / STACKED
    shutil.rmtree(joined, ignore_errors=True)
    concatenate_adapters(parts / EARLIER, parts, joined)
    for file in parts.iterdir():
        if file.is_file() and not (joined / file.name).exists():
            os.replace(file, folder / file.name)
    # The weights first: with the earlier configuration they do not load, with the earlier weights they would.
    for name in ("adapter_model.safetensors", ADAPTER):
        os.replace(joined / name, folder / name)
    shutil.rmtree(joined)
    shutil.rmtree(parts)
