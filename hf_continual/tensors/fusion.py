r"""Fusion of two movements of the same weights, element by element (Recurrent-KIF, arXiv 2502.17510).

From the anchor theta_b the weights moved by tau_in while a new task was learned and by tau_out while old rows were
replayed; m_in and m_out mark the elements that matter to each side:

    theta = theta_b + w_in tau_in + w_out tau_out

| m_in, m_out | "code" | "paper" | "no_shared" |
|---|---|---|---|
| both | 0.4, 0.6 | 1, 1 | 0, 0 |
| in only | 1, 0 | 1, 0 | 1, 0 |
| out only | 0, 1 | 0, 1 | 0, 1 |
| neither | 0.5, 0.5 | 0, 0 | 0.5, 0.5 |
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

MaskRule = Literal["code", "paper", "no_shared"]

# (w_in, w_out) for both, in only, out only, neither.
WEIGHTS: dict[str, tuple[tuple[float, float], ...]] = {
    "code": ((0.4, 0.6), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)),
    "paper": ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)),
    "no_shared": ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)),
}


def mask_weights(mask_in: Tensor, mask_out: Tensor, rule: MaskRule = "code") -> tuple[Tensor, Tensor]:
    """Weights of the two movements, from the module's table.

    Args:
        mask_in: Elements that matter to the new task, bool.
        mask_out: Elements that matter to the old ones, bool.
        rule: Column of the table.

    Returns:
        w_in and w_out, float32, of the masks' shape.

    Raises:
        ValueError: If the rule is unknown.
    """
    if rule not in WEIGHTS:
        raise ValueError(f"rule={rule!r} is not known; there are {', '.join(WEIGHTS)}.")
    both, only_in, only_out, neither = torch.tensor(WEIGHTS[rule], device=mask_in.device).unbind(0)
    of_in = [torch.where(mask_out, both[i], only_in[i]) for i in (0, 1)]
    of_out = [torch.where(mask_out, only_out[i], neither[i]) for i in (0, 1)]
    w_in, w_out = (torch.where(mask_in, a, b) for a, b in zip(of_in, of_out, strict=True))
    return w_in, w_out


def adaptive_weights(score_in: Tensor, score_out: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Soft weights: the sigmoid of the difference of two normalised scores (the paper's ablation "adaptive").

    Args:
        score_in: Scores of the new task, scaled to [0, 1] over all parameters.
        score_out: Scores of the old tasks, likewise.
        temperature: Divisor of the difference, above 0.

    Returns:
        w_in, and w_out = 1 - w_in.
    """
    w_in = torch.sigmoid((score_in - score_out) / temperature)
    return w_in, 1 - w_in


def blend(anchor: Tensor, delta_in: Tensor, delta_out: Tensor, w_in: Tensor | float, w_out: Tensor | float) -> Tensor:
    """theta_b + w_in tau_in + w_out tau_out, in float32 at least, rounded once to the anchor's dtype."""
    kind = torch.promote_types(anchor.dtype, torch.float32)
    return (anchor.to(kind) + delta_in.to(kind) * w_in + delta_out.to(kind) * w_out).to(anchor.dtype)


def fuse(
    anchor: Tensor, delta_in: Tensor, delta_out: Tensor, mask_in: Tensor, mask_out: Tensor, rule: MaskRule = "code"
) -> Tensor:
    """Fuse the changes from a new task and from old rows; see the module for the rules.

    Args:
        anchor: theta_b, the weights both movements start from.
        delta_in: tau_in, movement on the new task.
        delta_out: tau_out, movement on old rows.
        mask_in: Elements that matter to the new task, bool.
        mask_out: Elements that matter to the old ones, bool.
        rule: ``"code"``: what the authors' trainer does; ``"paper"``: 0/1 masks; ``"no_shared"``: the ablation that
            leaves elements that matter to both where they were.

    Returns:
        Fused weights, in the anchor's dtype.

    Example:
        >>> one, yes = torch.ones(1), torch.tensor([True])
        >>> fuse(torch.zeros(1), one, 2 * one, yes, yes)
        tensor([1.6000])
    """
    return blend(anchor, delta_in, delta_out, *mask_weights(mask_in, mask_out, rule))
