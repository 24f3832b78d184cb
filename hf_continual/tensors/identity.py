"""Tell a base model from another one of the same shape by a few of its values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_continual.tensors.flat import local

VALUES = 8  # of each tensor: enough to distinguish trained weights, and read in one transfer


@torch.no_grad()
def base_sample(model: nn.Module, adapted: bool = True) -> str | None:
    """A hash over names, shapes and a few values of the weights below any adapter; the same in bf16 and fp32.

    Args:
        model: The unwrapped model, with or without adapters.
        adapted: Whether weights below adapters count; the others stay when an adapter is merged into its base.

    Returns:
        32 hexadecimal digits; None if weights are quantised, or not all on this process.
    """
    names, samples = [], []
    for name, tensor in model.named_parameters():
        if any(
            part in name
            for part in ("lora_", ".modules_to_save.", ".trainable_tokens_", "prompt_encoder", "prompt_pool.")
        ):
            continue
        if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point() or hasattr(tensor, "placements"):
            return None
        if not adapted and ".base_layer." in name:
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
        names.append(f"{plain}{tuple(tensor.shape)}")
        samples.append(_few(tensor.detach()))
    order = sorted(range(len(names)), key=names.__getitem__)
    digest = hashlib.sha256("".join(names[i] for i in order).encode())
    if samples:
        bits: Any = torch.stack([samples[i] for i in order]).cpu().view(torch.uint8).numpy()
        digest.update(bits.tobytes())
    elif not adapted:
        return None
    return digest.hexdigest()[:32]


@torch.no_grad()
def sample_of(params: Mapping[str, Tensor]) -> str:
    """A hash over names, shapes and a few values of some weights; if they are sharded, of this process's shards."""
    digest = hashlib.sha256("".join(f"{n}{tuple(p.shape)}" for n, p in params.items()).encode())
    for p in params.values():
        part = local(p.detach())
        bits: Any = _few(part).cpu().view(torch.uint8).numpy() if part.numel() else b""
        digest.update(bytes(bits))
    return digest.hexdigest()[:32]


def _few(tensor: Tensor) -> Tensor:
    """Some values of a tensor, evenly spread, in bfloat16 so that the dtype it was loaded in does not matter."""
    flat = tensor.reshape(-1)
    where = torch.linspace(0, flat.numel() - 1, VALUES, dtype=torch.float64).long().to(flat.device)
    return flat.index_select(0, where).to(torch.bfloat16)
