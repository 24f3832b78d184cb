"""What rules on task vectors share: checks of their options, an election of signs, an angle."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def check_density(density: float) -> None:
    """Refuse what is no share."""
    if not 0 < density <= 1:
        raise ValueError(f"density={density}: it is a share, above 0 and at most 1.")


def scales_for(scale: float | Sequence[float], number: int) -> tuple[float, ...]:
    """One coefficient per model.

    Args:
        scale: One for all, or one each.
        number: How many models there are.

    Returns:
        The coefficients.

    Raises:
        ValueError: If their number is wrong or one is not finite.
    """
    scales = (float(scale),) * number if isinstance(scale, int | float) else tuple(float(s) for s in scale)
    if len(scales) != number:
        raise ValueError(
            f"scale={list(scales)} has {len(scales)} numbers for {number} models. Give one, or one for each."
        )
    if not all(abs(s) < float("inf") for s in scales):
        raise ValueError(f"scale={list(scales)}: all must be finite.")
    return scales


def elect_and_merge(base: Tensor, changes: Sequence[Tensor], scale: float) -> Tensor:
    """Elect a sign per element, average the changes that are not 0 and have it, and add them, overwriting all.

    Args:
        base: Values of the base.
        changes: What each model changed of them, trimmed.
        scale: lambda.

    Returns:
        The result, in the memory of the base.
    """
    total = torch.zeros_like(base)
    for change in changes:
        total.add_(change)
    elected = total.sign()
    kept, count = total.zero_(), torch.zeros_like(base)
    for change in changes:
        agrees = change.sign() == elected
        agrees &= change != 0
        kept.add_(change.mul_(agrees))
        count.add_(agrees)
    return base.add_(kept.div_(count.clamp_(min=1.0)), alpha=scale)


def cosine(ab: float, aa: float, bb: float) -> float:
    """Of the angle between two vectors, from their products; 1 where one is zero."""
    length = math.sqrt(aa * bb)
    return 1.0 if length == 0 else max(-1.0, min(1.0, ab / length))
