r"""Consolidation of the weights before and after a task, unit by unit (TaSL, ACL 2024; TasLoRA, arXiv 2408.05200).

A unit is a tensor (TaSL) or a rank of an adapter (TasLoRA). Both sides' importance is scaled to [0, 1] over all units. A tensor
above the (1 - share) quantile of a side matters to that side:

    both sides: 0.3 present + 0.7 previous;   one side: that side's weights;   none: half of each

A rank is mixed softly, with s the scaled importance of its side: w = 1 / (1 + exp((s_previous - s_present) / tau)).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_continual.bounds import between

Importance = Mapping[str, Any]  # unit -> a number, or (R,) numbers of its ranks

PREVIOUS = 0.7  # weight of the previous side if both matter, and in the accumulated importance
NEITHER = 0.5


def scaled(importance: Importance) -> dict[str, np.ndarray]:
    """Importance scaled to [0, 1] over all units; all zero if all are equal."""
    values = {name: np.asarray(v, dtype=np.float64) for name, v in importance.items()}
    if not values:
        return {}
    low, high = min(v.min() for v in values.values()), max(v.max() for v in values.values())
    return {name: (v - low) / (high - low) if high > low else np.zeros_like(v) for name, v in values.items()}


def accumulate(present: Importance, previous: Importance, previous_weight: float = PREVIOUS) -> dict[str, np.ndarray]:
    """Importance to hand on: ``scaled((1 - w) scaled(present) + w scaled(previous))``; for a unit on one side, that side's.

    Args:
        present: Importance to the task.
        previous: Accumulated importance to the earlier tasks; empty after the first task.
        previous_weight: w.

    Returns:
        Importance by unit, in [0, 1].
    """
    now, then = scaled(present), scaled(previous)
    mixed = {n: (1 - previous_weight) * now[n] + previous_weight * then[n] for n in now if n in then}
    return scaled({**then, **now, **mixed})


def present_shares(
    importance_present: Importance,
    importance_previous: Importance,
    share: float = 0.2,
    previous_weight: float = PREVIOUS,
) -> dict[str, float]:
    """The fraction of the present weights in each tensor; the rest comes from the previous ones.

    Args:
        importance_present: Importance to the task.
        importance_previous: Importance to the earlier tasks, of the same units.
        share: Fraction of the units that matter to a side.
        previous_weight: Weight of the previous side if a unit matters to both.

    Returns:
        A number in [0, 1] by unit.
    """
    between("consolidate", "share", share, 0, 1, "]", "It is the fraction of units that matter to a side.")
    sides = [scaled(importance_present), scaled(importance_previous)]
    above = []
    for side in sides:
        threshold = np.quantile(np.array([float(v) for v in side.values()]), 1 - share) if side else 0.0
        above.append({name: float(v) > threshold for name, v in side.items()})
    rules = {(True, True): 1 - previous_weight, (True, False): 1.0, (False, True): 0.0, (False, False): NEITHER}
    return {name: rules[above[0][name], above[1][name]] for name in above[0]}


def present_rank_shares(
    importance_present: Importance, importance_previous: Importance, temperature: float = 0.25
) -> dict[str, Tensor]:
    """The fraction of the present weights in each rank of an adapter; the rest comes from the previous ones.

    Args:
        importance_present: Importance of the ranks to the task, (R,) by layer.
        importance_previous: Importance to the earlier tasks.
        temperature: tau; towards 0 the more important side wins.

    Returns:
        (R,) float32 numbers in (0, 1) by layer.
    """
    now, then = scaled(importance_present), scaled(importance_previous)
    return {n: torch.from_numpy((now[n] - then[n]) / temperature).sigmoid().float() for n in now}


def consolidate(
    present: Mapping[str, Tensor],
    previous: Mapping[str, Tensor],
    importance_present: Importance | Sequence[float] | Tensor,
    importance_previous: Importance | Sequence[float] | Tensor,
    share: float = 0.2,
    previous_weight: float = PREVIOUS,
) -> dict[str, Tensor]:
    """Mix the weights after and before a task, tensor by tensor (TaSL, sec. 3.3).

    Args:
        present: Weights after the task, by name.
        previous: Weights before it.
        importance_present: Importance of each tensor to the task: numbers by name, or in the order of `present`.
        importance_previous: Accumulated importance to the earlier tasks.
        share: Fraction of the tensors that matter to a side.
        previous_weight: Weight of the previous side if a tensor matters to both.

    Returns:
        New tensors by name; a tensor that one side lacks, or that was not measured on both, is the present one.

    Raises:
        ValueError: If importance is given without names and its length differs from that of `present`.
    """
    sides = []
    for side in (importance_present, importance_previous):
        if isinstance(side, Mapping):
            sides.append({n: side[n] for n in present if n in side})
            continue
        if len(side) != len(present):
            raise ValueError(f"{len(side)} importance values for {len(present)} tensors. Give one per tensor.")
        sides.append(dict(zip(present, side, strict=True)))
    known = [n for n in present if n in previous and all(n in side for side in sides)]
    now, then = ({n: side[n] for n in known} for side in sides)
    shares = present_shares(now, then, share, previous_weight)
    return {n: mixed(t, previous[n], shares[n]) if n in shares else t.clone() for n, t in present.items()}


def mixed(present: Tensor, previous: Tensor, share: float | Tensor) -> Tensor:
    """``share * present + (1 - share) * previous``, computed in float32; in the dtype of `present`."""
    if isinstance(share, float) and share in (0.0, 1.0):
        return (present if share else previous.to(present)).clone()
    return (share * present.float() + (1 - share) * previous.to(present.device).float()).to(present.dtype)


def rank_scores(scores_A_RD: Tensor, scores_B_OR: Tensor) -> Tensor:
    """Importance of each rank of an adapter, (R,): mean of the outer product of its scores in B and in A (TasLoRA).

    Args:
        scores_A_RD: Scores of the factor A, (R, D).
        scores_B_OR: Scores of the factor B, (O, R).

    Returns:
        float64.
    """
    return scores_B_OR.double().mean(dim=0) * scores_A_RD.double().mean(dim=1)


def orthonormality_gradient(P_LRD: Tensor) -> Tensor:
    """Gradient of ``sum_l |P P^T - I|_F``, the regulariser of TasLoRA, with respect to P.

    Args:
        P_LRD: Rows to make orthonormal, for L layers, (L, R, D).

    Returns:
        2 (P P^T - I) P / |P P^T - I|_F, of the same shape; zero where they are orthonormal.
    """
    apart = P_LRD @ P_LRD.mT - torch.eye(P_LRD.shape[-2], device=P_LRD.device, dtype=P_LRD.dtype)
    length = torch.linalg.matrix_norm(apart, keepdim=True).clamp(min=1e-12)
    return 2 * (apart / length) @ P_LRD
