"""LoRA whose ranks are weighted: several small adapters, kept as one, each with a weight of its own for every sample or token.

With the factors A_e of E adapters one below the other, and their B_e side by side,

    sum_e g_e B_e A_e x = B (g * A x),

where g repeats each weight over the ranks of its adapter. So a mixture costs what one adapter of the summed rank costs, and
everything that trains, quantises, saves or shards a LoRA adapter works on it unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

__all__ = ["check_not_spread", "expand_ranks", "gated_layers", "is_reentrant", "mixed_delta", "weigh_ranks"]


def expand_ranks(weights: Tensor, ranks: Sequence[int]) -> Tensor:
    """A weight per adapter as a weight per rank.

    Args:
        weights: (..., E).
        ranks: Rank of each of the E adapters.

    Returns:
        (..., sum of the ranks).
    """
    if len(set(ranks)) == 1:
        return weights.repeat_interleave(ranks[0], dim=-1)
    return weights.repeat_interleave(torch.tensor(ranks, device=weights.device), dim=-1, output_size=sum(ranks))


def mixed_delta(x: Tensor, A_RD: Tensor, B_OR: Tensor, weights: Tensor, ranks: Sequence[int], scaling: float) -> Tensor:
    """What weighted adapters add to the output of a linear layer, scaling sum_e g_e B_e A_e x.

    Args:
        x: Input of the layer, (..., D).
        A_RD: Factors A, one below the other.
        B_OR: Factors B, side by side.
        weights: g, (..., E); must broadcast against x but for its last dimension.
        ranks: Rank of each adapter.
        scaling: LoRA's alpha / r.

    Returns:
        (..., O).
    """
    return (expand_ranks(weights, ranks) * (x @ A_RD.mT)) @ B_OR.mT * scaling


def weigh_ranks(inner: Tensor, weights: Tensor, ranks: Sequence[int]) -> Tensor:
    """A x with each adapter's ranks weighted.

    Args:
        inner: A x, (B, S, R); where a layer sees all tokens in a row, as an expert of a router does, (N, R).
        weights: (E) for all alike, (B, E) per sample, or (B, S, E) per token.
        ranks: Rank of each adapter.

    Returns:
        As `inner`.

    Raises:
        ValueError: If weights per sample meet tokens in a row, whose sample is not known.
    """
    if weights.dim() > 1 and inner.dim() != 3 and weights.shape[:-1] != inner.shape[:-1]:
        raise ValueError(
            f"A layer sees {inner.shape[0]} tokens in a row without their samples (shape {tuple(inner.shape)}), as experts of "
            f"a mixture-of-experts model do, and its adapter is weighted per sample. Adapt other layers, such as the "
            f"attention: LoraConfig(target_modules=['q_proj', 'v_proj'])."
        )
    gate = expand_ranks(weights, ranks).to(inner.dtype)
    return inner * (gate.unsqueeze(1) if gate.dim() == 2 and inner.dim() == 3 else gate)


def gated_layers(model: nn.Module, adapter: str, owner: str) -> dict[str, Any]:
    """The LoRA layers of an adapter by name, all of a kind whose ranks can be weighted.

    Args:
        model: The model that carries the adapter, without PEFT's wrapper.
        adapter: Its name.
        owner: The class that asks, for messages.

    Returns:
        Layer by its name in the model.

    Raises:
        ValueError: If there is none, or one does more than B A x.
    """
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or not (adapter in module.lora_A or adapter in module.lora_embedding_A):
            continue
        if isinstance(module, ParamWrapper) or adapter not in module.lora_A or module.lora_variant.get(adapter):
            raise ValueError(
                f"{owner}: the adapter of {name} ({type(module).__name__}) is more than B A x (an embedding, a parameter or a "
                f"variant such as DoRA), so its ranks cannot be weighted. Adapt linear layers with plain LoRA: "
                f"LoraConfig(target_modules='all-linear')."
            )
        found[name] = module
    if not found:
        raise ValueError(
            f"{owner}: the {type(model).__name__} has no LoRA layer under the adapter {adapter!r}. Give "
            f"peft_config=LoraConfig(target_modules='all-linear')."
        )
    return found


def is_reentrant(model: nn.Module) -> bool:
    """Whether layers are checkpointed in the old way, which keeps only the gradients of tensors among their inputs and outputs."""
    used = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    functions = [getattr(m, "_gradient_checkpointing_func", None) for m in used]
    return any(getattr(f, "keywords", {}).get("use_reentrant") for f in functions)


def check_not_spread(model: nn.Module, owner: str) -> None:
    """Refuse weights that ZeRO-3 has spread over the processes, whose sizes cannot be read.

    Args:
        model: The model.
        owner: The class that asks, for messages.

    Raises:
        ValueError: If they are.
    """
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError(
            f"{owner} under ZeRO-3: it reads the weights before training, and ZeRO-3 has spread them over the processes by then. "
            f"Use ZeRO-2, DDP or FSDP2, or drop the method."
        )
