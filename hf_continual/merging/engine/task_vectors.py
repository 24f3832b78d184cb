"""Helpers that rules on task vectors share: option checks, an election of signs, an angle."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from hf_continual.bounds import between
from hf_continual.merging.engine.room import Room


def check_density(owner: str, density: float) -> None:
    """Refuse a density that is not a fraction."""
    between(owner, "density", density, 0, 1, "]", "It is the fraction of the changes that is kept.")


def scales_for(scale: float | Sequence[float], number: int, key: str = "scale") -> tuple[float, ...]:
    """One coefficient per model.

    Args:
        scale: One for all, or one each.
        number: How many models there are.
        key: The option that they are given as.

    Returns:
        The coefficients.

    Raises:
        TypeError: If they are not numbers.
        ValueError: If there are too many or too few, or one is not finite.
    """
    given = scale if isinstance(scale, Sequence) and not isinstance(scale, str) else (scale,) * number
    if any(isinstance(s, bool) or not isinstance(s, int | float) for s in given):
        raise TypeError(f"{key}={scale!r}: give a number, or a list with one for each model.")
    scales = tuple(float(s) for s in given)
    if len(scales) != number:
        raise ValueError(
            f"{key}={list(scales)} has {len(scales)} numbers for {number} models. Give one, or one for each."
        )
    if not all(abs(s) < float("inf") for s in scales):
        raise ValueError(f"{key}={list(scales)}: all must be finite.")
    return scales


def elect_and_merge(base: Tensor, changes: Sequence[Tensor], scale: float, room: Room | None = None) -> Tensor:
    """Elect a sign per element, average the nonzero changes that have it, and add the average; all inputs are overwritten.

    Args:
        base: Values of the base.
        changes: Each model's change from them, trimmed.
        scale: lambda.
        room: Scratch memory.

    Returns:
        The result, in the base's memory.
    """
    room = room or Room()
    elected, kept, count = (room.like(base, key) for key in ("elected", "kept", "count"))
    elected.copy_(changes[0])
    for change in changes[1:]:
        elected.add_(change)
    elected.sign_()
    kept.zero_()
    count.zero_()
    for change in changes:
        # Above 0 where it has the elected sign. All in one dtype: boolean masks are ten times slower.
        agreeing = change.mul_(elected).clamp_(min=0.0)
        kept.add_(agreeing)
        count.add_(agreeing.sign_())
    return base.add_(kept.mul_(elected).div_(count.clamp_(min=1.0)), alpha=scale)


def cosine(ab: float, aa: float, bb: float) -> float:
    """Cosine of the angle between two vectors, from their products; 1 if one is zero."""
    length = math.sqrt(aa * bb)
    return 1.0 if length == 0 else max(-1.0, min(1.0, ab / length))
