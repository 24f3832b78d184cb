"""From hidden states to logits: a model's head, with its family's scaling and cap of the product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

# Configuration keys of a factor before the cap: Cohere, Muse, Falcon-H1. Granite divides, HyperCLOVA X multiplies.
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVISOR = "logits_scaling"
MULTIPLIES = ("hyperclovax",)
# Configuration keys of a soft cap: Gemma 2 and many more, RecurrentGemma, xLSTM.
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class Finish:
    """A family's change to the product of hidden states and head: a factor, then a soft cap.

    Args:
        scale: Factor.
        cap: Logits are kept within (-cap, cap) by tanh; None leaves them unchanged.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, product: Tensor) -> Tensor:
        """Logits from the bare product, same shape and dtype."""
        product = product if self.scale == 1.0 else product * self.scale
        return product if self.cap is None else self.cap * torch.tanh(product / self.cap)


def plain_model(model: Any) -> Any:
    """The causal language model below any adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def finish_of(model: Any) -> Finish:
    """Factor and cap of a causal language model, with or without adapters, from its configuration."""
    config = plain_model(model).config.get_text_config()

    def first(keys: tuple[str, ...]) -> float | None:
        return next((value for key in keys if (value := getattr(config, key, None)) is not None), None)

    scale = first(FACTORS)
    if scale is None and (divisor := getattr(config, DIVISOR, None)) is not None:
        scale = divisor if config.model_type.startswith(MULTIPLIES) else 1 / divisor
    return Finish(1.0 if scale is None else float(scale), first(CAPS))


def logits_function(model: Any) -> Callable[[Tensor], Tensor]:
    """A function from last hidden states (..., D) to logits (..., V) as the model itself computes them.

    Args:
        model: A causal language model, with or without adapters.

    Returns:
        The function; gradients reach the hidden states and the head.
    """
    head, finish = plain_model(model).get_output_embeddings(), finish_of(model)

    def logits(hidden: Tensor) -> Tensor:
        return finish(head(hidden.to(head.weight.device)))

    return logits


def base_head(model: Any) -> Any:
    """The head below any adapter on it, or below the copy of it that an adapter trains."""
    head = plain_model(model).get_output_embeddings()
    return getattr(head, "original_module", None) or (
        head.get_base_layer() if hasattr(head, "get_base_layer") else head
    )


def base_logits_function(model: Any) -> Callable[[Tensor], Tensor]:
    """Like `logits_function`, with the head of the base: for models with an adapter, which leaves that head unchanged."""
    head, finish = base_head(model), finish_of(model)

    def logits(hidden: Tensor) -> Tensor:
        return finish(head(hidden.to(head.weight.device)))

    return logits


def head_bias(model: Any) -> Tensor | None:
    """The bias of the head, if it has one."""
    return getattr(plain_model(model).get_output_embeddings(), "bias", None)


def head_tensors(model: Any) -> dict[str, Tensor]:
    """Weight (V, D) and, if there is one, bias (V) of the head as it is now, copied to the CPU in bfloat16."""
    kept = {"head": plain_model(model).get_output_embeddings().weight, "head_bias": head_bias(model)}
    return {name: t.detach().to(torch.bfloat16).cpu().clone() for name, t in kept.items() if t is not None}


def recorded_logits(weight_VD: Tensor, bias_V: Tensor | None = None, *, finish: Finish) -> Callable[[Tensor], Tensor]:
    """Logits from a head that was recorded with `head_tensors`, in the dtype of its weight."""

    def logits(hidden: Tensor) -> Tensor:
        return finish(linear(hidden.to(weight_VD.dtype), weight_VD, bias_V))

    return logits


def head_differs(model: Any, hidden_SD: Tensor, logits_SV: Tensor) -> str | None:
    """Find a step between a model's last hidden states and its logits that `logits_function` does not know.

    Args:
        model: A causal language model, with or without adapters.
        hidden_SD: Last hidden states of a row.
        logits_SV: The model's own logits for it.

    Returns:
        A clause for a message, or None if both agree up to rounding.
    """
    found_SV = logits_function(model)(hidden_SD)
    name = type(plain_model(model)).__name__
    if found_SV.shape != logits_SV.shape:
        return f"{name} returns {logits_SV.shape[-1]} logits, but its head has {found_SV.shape[-1]} rows"
    distance = float((found_SV.float() - logits_SV.float().to(found_SV.device)).abs().max())
    spread = float(logits_SV.float().std())
    if distance <= 0.05 * spread + 1e-6:
        return None
    return f"those of {name} differ from the model's own by up to {distance:.3g} (their standard deviation is {spread:.3g})"
