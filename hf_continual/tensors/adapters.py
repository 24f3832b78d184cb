"""Taking adapters off modules, so that a saved adapter loads as it was trained."""

from __future__ import annotations

import re
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def adapters_below(model: PeftModel, modules: dict[str, nn.Module]) -> dict[str, BaseTunerLayer]:
    """The adapter layers inside some modules, by their name in the base model."""
    inside = {id(m) for module in modules.values() for m in module.modules()}
    base = model.get_base_model()
    return {n: m for n, m in base.named_modules() if id(m) in inside and isinstance(m, BaseTunerLayer)}


def is_fresh(layer: Any) -> bool:
    """Whether an adapter has learnt nothing: one factor of its product is all zero.

    An adapter without such a factor (initialised from the weights, or already trained) is not fresh. One on the
    meta device holds no values and counts as fresh: it is looked at before anything is loaded.
    """
    zero = [
        p.is_meta or not bool(p.detach().any())
        for name, p in layer.named_parameters()
        if ("lora_B" in name or "lora_embedding_A" in name) and "bias" not in name
    ]
    magnitude = any("lora_magnitude_vector" in name for name, _ in layer.named_parameters())
    return bool(zero) and all(zero) and not magnitude


def remove_adapters(model: PeftModel, layers: dict[str, BaseTunerLayer]) -> None:
    """Put the plain module back in place of adapter layers, and say so in the adapter's configuration.

    Args:
        model: The model whose adapter configuration is extended by `exclude_modules`.
        layers: Adapter layers by their name in the base model.
    """
    base = model.get_base_model()
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        setattr(base.get_submodule(parent), last, layer.get_base_layer())
    for adapter in model.active_adapters:
        config: Any = model.peft_config[adapter]
        before = getattr(config, "exclude_modules", None)
        if isinstance(before, str):
            config.exclude_modules = "|".join([f"(?:{before})", *map(re.escape, layers)])
        else:
            config.exclude_modules = sorted({*(before or ()), *layers})
