r"""Importance of single parameters, and the most important fraction of them.

The sensitivity |w g| of a parameter estimates by how much the loss would change without it (first-order Taylor term).
One batch gives a noisy estimate, so it is smoothed over steps, and parameters with an uncertain estimate count more
(PLATON, Zhang et al., ICML 2022; used by AdaLoRA, TaSL and Recurrent-KIF):

    I <- b1 I + (1 - b1) |w g|          U <- b2 U + (1 - b2) | |w g| - I |          score = I U
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hf_continual.tensors.flat import Flat
from hf_continual.tensors.selection import kth_smallest, value_of_rank

Order = Literal["first", "second", "mixed"]
Scope = Literal["global", "tensor"]

# Both factors of a score are multiplied with it: a power of two changes no digit, and the product of two small
# averages (below 1e-19 each) no longer underflows in float32.
SCALE = 2.0**40
# Up to this many values are selected from in one copy. Beyond it, counting in pieces takes no memory, is as fast on a
# CPU, and uses all of a device, where `kthvalue` gives a whole tensor to one multiprocessor.
SELECTED_DIRECTLY = 1 << 16


def sensitivity(param: Tensor, grad: Tensor, order: Order = "first") -> Tensor:
    """Change of the loss if a parameter were zero: |w g|, (w g)^2, or |w g - (w g)^2 / 2|.

    Args:
        param: Weights w.
        grad: Gradient g of the loss at w.
        order: Taylor terms: the first, the second (with g^2 for the Hessian), or both.

    Returns:
        float32, at least 0, of the same shape.

    Raises:
        ValueError: If `order` is unknown.
    """
    product = param.float() * grad.float()
    if order == "first":
        return product.abs_()
    if order == "second":
        return product.square_()
    if order == "mixed":
        return (product - 0.5 * product * product).abs_()
    raise ValueError(f"order={order!r} is not known; there are first, second, mixed.")


@torch.no_grad()
def update_importance_(
    importance: Tensor,
    uncertainty: Tensor | None,
    param: Tensor,
    grad: Tensor,
    beta1: float = 0.85,
    beta2: float = 0.85,
    order: Order = "first",
    valid: Tensor | None = None,
) -> None:
    """Add one step's gradient to the two averages, in place (Recurrent-KIF's code, as AdaLoRA's).

    Args:
        importance: I, float32; zeros at first.
        uncertainty: U, float32; zeros at first. None if it is not used.
        param: Weights, as they are after the step.
        grad: The clipped gradient of that step.
        beta1: Decay of I.
        beta2: Decay of U.
        order: See `sensitivity`.
        valid: Scalar bool on the device; if it is False the step changes nothing. Avoids waiting for the device.
    """
    now = sensitivity(param, grad, order)
    if valid is not None:
        now = torch.where(valid, now, importance)  # not a product: 0 times NaN is NaN
    importance.lerp_(now, 1 - beta1)
    if uncertainty is not None:
        rate = 1 - beta2 if valid is None else valid.float() * (1 - beta2)
        uncertainty.lerp_(now.sub_(importance).abs_(), rate)


@torch.no_grad()
def record_step_(
    flat: Flat,
    importance: Tensor,
    uncertainty: Tensor | None,
    beta1: float = 0.85,
    beta2: float = 0.85,
    order: Order = "first",
    add_up: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Add a step's gradients to the two averages of all weights; a step that is not finite changes nothing.

    Args:
        flat: Layout of the weights, which have moved; their clipped gradients are still there.
        importance: I, a buffer of `flat`.
        uncertainty: U, another, or None.
        beta1: Decay of I.
        beta2: Decay of U.
        order: See `sensitivity`.
        add_up: Sums over processes if they hold different shards of the weights, else None.

    Returns:
        Scalar bool on the device: whether the step was finite.
    """
    grads = flat.all_gradients()
    wrong = torch.zeros((), device=flat.device)
    if grads:
        wrong = (~torch.isfinite(torch.stack(torch._foreach_norm(grads)))).any().float()
    if add_up is not None:
        wrong = add_up(wrong)
    valid = wrong == 0
    for bucket in flat.buckets:
        spread = None if uncertainty is None else bucket.of(uncertainty)
        weights, gradients = flat.weights(bucket), flat.gradients(bucket)
        update_importance_(bucket.of(importance), spread, weights, gradients, beta1, beta2, order, valid)
    return valid


def scores(importance: Tensor, uncertainty: Tensor | None, out: Tensor | None = None) -> Tensor:
    """I U, or I alone, up to a constant power of two that keeps small products.

    Args:
        importance: I.
        uncertainty: U, or None if the score is I.
        out: Where the result goes; may be one of the two.

    Returns:
        Scores, float32.
    """
    if uncertainty is None:
        return torch.mul(importance, SCALE, out=out)
    return torch.mul(importance * SCALE, uncertainty * SCALE, out=out)


def share_rank(count: int, share: float) -> int:
    """Rank of the largest value that is not in the top fraction: floor((1 - share) (count - 1)), from 0.

    Args:
        count: Number of values.
        share: Fraction to lie above, in (0, 1].

    Returns:
        The rank. All values above it are strictly above the linearly interpolated quantile, which lies between
        this value and the next, and never equals the next.

    Raises:
        ValueError: If the fraction is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share!r} must lie in (0, 1]: it is the fraction of parameters that is selected.")
    # 1 - 0.2 is exactly 0.8, but 0.8 * 5 need not be 4: a rounding error must not cost a rank.
    position = (1 - share) * (count - 1)
    return round(position) if math.isclose(position, round(position), rel_tol=1e-12) else math.floor(position)


def share_threshold(
    values: Tensor, share: float, count: int | None = None, add_up: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The value that the top fraction lies strictly above.

    Args:
        values: Scores, any shape; with several processes, this one's part.
        share: See `share_rank`.
        count: Number of values on all processes, if they are sharded.
        add_up: Sums counts over the processes, if they are sharded.

    Returns:
        Scalar on the device of `values`.
    """
    if add_up is not None:
        return kth_smallest(lambda: [values], share_rank(count or values.numel(), share), add_up).to(values.device)
    rank = share_rank(values.numel(), share)
    if values.numel() > SELECTED_DIRECTLY and values.dtype != torch.float64:
        return kth_smallest(lambda: [values], rank)
    if values.device.type == "cpu":
        # numpy's selection uses the vector unit; torch's `kthvalue` takes several times as long on a CPU.
        held = values.detach().flatten()
        held = held if held.dtype == torch.float64 else held.float()
        return torch.as_tensor(np.partition(held.numpy(), rank)[rank])
    return value_of_rank(values.flatten(), rank)[0]


def top_share_masks(scores: Mapping[str, Tensor], share: float = 0.2, scope: Scope = "global") -> dict[str, Tensor]:
    """Select the most important fraction of all parameters, or of each tensor: strictly above the quantile.

    Ties at the quantile are not selected: if all scores are equal, none is. Exact for any number of scores
    (`torch.quantile` stops at 2^24), and several times faster.

    Args:
        scores: Scores by parameter name.
        share: Fraction to select, in (0, 1].
        scope: One quantile over all tensors, or one for each.

    Returns:
        Bool masks of the same shapes.

    Raises:
        ValueError: If there are no scores, one is not finite, or an option is unknown.
    """
    if scope not in ("global", "tensor"):
        raise ValueError(f"scope={scope!r} is not known; there are global, tensor.")
    filled = {name: s for name, s in scores.items() if s.numel()}
    if not filled:
        raise ValueError("there are no scores to select from.")
    for name, s in filled.items():
        if not torch.isfinite(s).all():
            raise ValueError(f"the scores of {name} are not all finite; they cannot be ranked.")
    if scope == "tensor":
        return {n: s > share_threshold(s, share) if s.numel() else s > 0 for n, s in scores.items()}
    threshold = share_threshold(torch.cat([s.flatten() for s in filled.values()]), share)
    return {name: s > threshold for name, s in scores.items()}
