r"""The threshold-margin loss of GeRe, with a backward that keeps one byte per unit.

A unit with state s may lie in (-inf, low] for -1, [low, high] for 0, [high, inf) for +1. With d the signed distance of
z from its interval,

    TM = sum |d| / number of units with d != 0          ("violations", the authors' code)
    TM = sum |d| / number of units                      ("entries")
    TM = sum |d| / number of tokens                     ("tokens")

and dTM/dz = sign(d) over the same number, through which no gradient flows. Under "violations" the L1 norm of the
gradient is 1 whenever one unit is violated, however little: distances below `dead_band` count as zero.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Reduction = Literal["violations", "entries", "tokens"]

TILE = 1 << 18  # units handled at once: the temporaries stay in the cache


class _Margin(torch.autograd.Function):
    """Sum of distances and number of violated units; backward needs only the sign of each distance."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, states_TD: Tensor, low_D: Tensor, high_D: Tensor, mask_T: Tensor, dead_band: float
    ) -> tuple[Tensor, Tensor]:
        signs = torch.empty_like(states_TD)
        total = torch.zeros((), device=hidden_TD.device)
        count = torch.zeros((), device=hidden_TD.device)
        step = max(TILE // max(hidden_TD.shape[1], 1), 1)
        inf = torch.full((), float("inf"), device=hidden_TD.device)
        for start in range(0, hidden_TD.shape[0], step):
            part = slice(start, start + step)
            z, s = hidden_TD[part].float(), states_TD[part]
            upper = torch.where(s < 0, low_D, torch.where(s > 0, inf, high_D))
            lower = torch.where(s > 0, high_D, torch.where(s < 0, -inf, low_D))
            distance = z - torch.minimum(torch.maximum(z, lower), upper)
            distance.mul_(mask_T[part, None])
            if dead_band > 0:
                distance.masked_fill_(distance.abs() < dead_band, 0.0)
            total += distance.abs().sum()
            count += (distance != 0).sum()
            signs[part] = distance.sign_().to(torch.int8)
        ctx.save_for_backward(signs)
        ctx.dtype = hidden_TD.dtype
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (signs,) = ctx.saved_tensors
        return signs.to(ctx.dtype) * grads[0].to(ctx.dtype), None, None, None, None, None


def margin(
    hidden_TD: Tensor, states_TD: Tensor, low_D: Tensor, high_D: Tensor, mask_T: Tensor, dead_band: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Sum of the distances from the intervals, and number of units outside; see `tm_loss`."""
    return _Margin.apply(hidden_TD, states_TD, low_D.float(), high_D.float(), mask_T.float(), dead_band)  # pyrefly: ignore


def reduced(total: Tensor, count: Tensor, tokens: Tensor | float, channels: int, reduction: Reduction) -> Tensor:
    """The sum of distances divided as the reduction says; 0 for a zero divisor."""
    if reduction == "violations":
        return total / (count + 1e-8)
    units = tokens if reduction == "tokens" else tokens * channels
    return total / torch.clamp(torch.as_tensor(units, device=total.device), min=1)


def tm_loss(
    hidden_BSD: Tensor,
    states_BSD: Tensor,
    low_D: Tensor,
    high_D: Tensor,
    mask_BS: Tensor,
    reduction: Reduction = "violations",
    dead_band: float = 0.0,
) -> Tensor:
    """Threshold-margin loss: keep each unit on its recorded side of the thresholds (GeRe, section on TM loss).

    Args:
        hidden_BSD: Last hidden states of this forward pass, any float type.
        states_BSD: Recorded states, int8 in {-1, 0, +1}.
        low_D: Lower threshold of each channel.
        high_D: Upper threshold of each channel.
        mask_BS: True where a token counts.
        reduction: Divisor of the sum of distances.
        dead_band: Distances below it count as zero.

    Returns:
        float32 scalar of at least 0; 0 when no unit is outside its interval.

    Raises:
        ValueError: If the reduction is unknown.

    Example:
        >>> tm_loss(torch.ones(1, 1, 1), -torch.ones(1, 1, 1, dtype=torch.int8), torch.zeros(1), torch.ones(1), torch.ones(1, 1))
        tensor(1., grad_fn=...)
    """
    if reduction not in ("violations", "entries", "tokens"):
        raise ValueError(f"tm_loss(reduction={reduction!r}) must be 'violations', 'entries' or 'tokens'.")
    channels = hidden_BSD.shape[-1]
    total, count = margin(
        hidden_BSD.reshape(-1, channels),
        states_BSD.reshape(-1, channels),
        low_D,
        high_D,
        mask_BS.reshape(-1),
        dead_band,
    )
    return reduced(total, count, mask_BS.sum(), channels, reduction)
