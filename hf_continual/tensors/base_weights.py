"""The weights that adapters stand on, and which weights belong to linear layers."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn


@torch.no_grad()
def adapted_weight(model: nn.Module, factor: str) -> Tensor | None:
    """The weight that a trained LoRA adapter is added to: its base, dequantised, with the other active adapters.

    Args:
        model: The unwrapped model.
        factor: Name of the adapter's factor A in it.

    Returns:
        (O, I), float32, oriented as B A; None if the base is not a matrix (experts in one tensor).
    """
    path, _, rest = factor.partition(".lora_A")
    found = model.get_submodule(path)
    if not isinstance(found, LoraLayer):
        return None
    layer: Any = found
    base = dequantize_module_weight(layer.get_base_layer()).detach().float()
    if base.dim() != 2:
        return None
    trained = rest.split(".")[1]
    for name in layer.active_adapters:
        if name != trained and name in layer.lora_A:
            base = base + layer.get_delta_weight(name).float()
    return base.T if getattr(layer, "fan_in_fan_out", False) else base


def linear_weights(model: nn.Module) -> set[str]:
    """Names of the matrices of linear layers, also transposed ones (GPT-2), except the language-model head's."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    of_head = {id(p) for p in head.parameters()} if head is not None else set()
    found = set()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if linear and isinstance(weight, nn.Parameter) and weight.dim() == 2 and id(weight) not in of_head:
            found.add(f"{name}.weight")
    return found
