"""The losses other than the threshold margin: the authors' mixed cross-entropy, and the paper's imitation baselines."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div, linear, log_softmax
from torch.utils.checkpoint import checkpoint

TEMPERATURE = 2.0  # of the authors' KL
TILE = 256  # tokens whose logits exist at once


def mixed_ce(loss_BS: Tensor, general_BS: Tensor, task_BS: Tensor) -> Tensor:
    """The authors' cross-entropy of a micro-batch: the mean of the means of general and task tokens.

    Args:
        loss_BS: Loss of each predicted token.
        general_BS: True where a token of a general sample is predicted.
        task_BS: True where a token of the task is predicted.

    Returns:
        1/2 (CE_general + CE_task); if one has no tokens, the other alone.
    """
    means, there = [], []
    for mask in (general_BS, task_BS):
        count = mask.sum()
        means.append((loss_BS * mask).sum() / count.clamp(min=1))
        there.append((count > 0).to(loss_BS.dtype))
    return sum(means[1:], start=means[0]) / (there[0] + there[1]).clamp(min=1)


def imitation(hidden_TD: Tensor, reference_TD: Tensor, norm: Literal["l1", "l2"]) -> Tensor:
    """Feature imitation, a baseline of the paper: mean |z - h| or (z - h)^2 over all units."""
    difference = hidden_TD.float() - reference_TD.float()
    return difference.abs().mean() if norm == "l1" else difference.square().mean()


def logit_divergence(
    hidden_TD: Tensor,
    reference_TD: Tensor,
    head: Callable[[Tensor], Tensor],
    reference_head: Callable[[Tensor], Tensor] | Tensor,
) -> Tensor:
    """KL of the reference's next-token distribution from the model's, mean over tokens, at temperature 2.

    Args:
        hidden_TD: Last hidden states of the model.
        reference_TD: Those of the reference.
        head: Logits of the model's hidden states, including the family's scaling and cap (`logits_function`).
        reference_head: The same for the reference; or its weight (V, D), if its logits are the plain product.

    Returns:
        Mean over tokens of sum_v p_v (log p_v - log q_v), p the reference. Logits exist for 256 tokens at a time.
    """

    reference: Any = partial(_product, reference_head) if isinstance(reference_head, Tensor) else reference_head

    def tile(z: Tensor, h: Tensor) -> Tensor:
        wanted = log_softmax(reference(h).float() / TEMPERATURE, dim=-1)
        return kl_div(log_softmax(head(z).float() / TEMPERATURE, dim=-1), wanted, reduction="sum", log_target=True)

    total = torch.zeros((), device=hidden_TD.device)
    for z, h in zip(hidden_TD.split(TILE), reference_TD.split(TILE), strict=True):
        part: Any = checkpoint(tile, z, h, use_reentrant=False)
        total = total + part.to(total.device)
    return total / max(hidden_TD.shape[0], 1)


def _product(weight_VD: Tensor, hidden_TD: Tensor) -> Tensor:
    return linear(hidden_TD.to(weight_VD.dtype), weight_VD)
