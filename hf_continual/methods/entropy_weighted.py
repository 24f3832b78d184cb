r"""EAFT: a token counts as much as the model is unsure about it.

Diao et al., "Entropy-Adaptive Fine-Tuning: Resolving Confident Conflicts to Mitigate Forgetting", 2026,
https://arxiv.org/abs/2601.02151.

Where the model is sure of something else than what the new row says, fine-tuning overwrites what it knows. The loss of each
token is weighted with the entropy of the model's own prediction there, without gradient:

    L = 1/N sum_t w_t (-log p_t),        w_t = min(H_t / H_full, 1)^alpha

H_t is the entropy over the whole vocabulary in nats, which TRL's fused head computes for its log anyway. The paper takes
it over the 20 likeliest tokens, renormalised and divided by ln 20 (3.0 in the published code), so that weights lie between 0
and 1. Here H_full = 3.0 and the weight is cut at 1, which has the same range; where more than 20 tokens share the
probability, ours is the larger. Axolotl's port does not divide.

N is the number of loss tokens of the whole step, as without the method: the loss does not depend on accumulation or
processes. Weights are not renormalised, so the loss is smaller than the plain one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_continual.bounds import at_least, between, plain_name
from hf_continual.methods.base import Forward, Method
from hf_continual.paper import Paper

__all__ = ["EntropyWeighted", "entropy_weight"]


def entropy_weight(entropy_BS: Tensor, alpha: float, full_at: float) -> Tensor:
    """Weight of each token from the entropy of its prediction.

    Args:
        entropy_BS: H in nats; any shape. Rounding may put it slightly below 0.
        alpha: Exponent.
        full_at: H_full in nats.

    Returns:
        ``min(H / H_full, 1)^alpha``, from 0 to 1, without gradient, of the same shape.
    """
    return (entropy_BS.detach() / full_at).clamp(0, 1) ** alpha


@dataclass
class EntropyWeighted(Method):
    """Weight the loss of each token with the entropy of the model's prediction.

    Idea: tokens that the model is sure about are learned or in conflict with what it knows; neither should move it.
    Hooks: token weights. Cost: none; the entropy is computed by TRL's loss in any case.
    Relations: `MaskSurprising` asks the base, once, about the token itself; `KLToBase` with ``weighting="probability"`` weighs by
    the token's own probability, which does the opposite where the model is unsure. Composes with everything; with another
    method that weighs tokens both weights are multiplied. Replayed rows are not weighed.
    Independent replications found small and mixed gains (axolotl, gemma-3-1b: MMLU +0.6 points, IFEval -1.3): compare with a
    lower learning rate.

    Args:
        alpha: Exponent, 1 in the paper; 0 is plain fine-tuning.
        full_at: Entropy in nats at and above which a token counts in full; the published code uses 3.0, about ln 20.
        name: Prefix of the logged values.

    Raises:
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If one is out of range.
    """

    alpha: float = 1.0
    full_at: float = 3.0
    name: str = "entropy_weighted"  # pyrefly: ignore[bad-override]

    paper: ClassVar[Paper] = Paper(
        "Entropy-Adaptive Fine-Tuning: Resolving Confident Conflicts to Mitigate Forgetting",
        "Diao et al.",
        2026,
        arxiv="2601.02151",
    )

    def __post_init__(self) -> None:
        at_least("EntropyWeighted", "alpha", self.alpha, 0)
        between("EntropyWeighted", "full_at", self.full_at, 0, float("inf"), note="It is an entropy in nats.")
        plain_name("EntropyWeighted", self.name)

    def weighs_tokens(self) -> bool:
        """Not where every weight is 1."""
        return self.alpha != 0

    def weigh_tokens(self, forward: Forward) -> Tensor:
        """The weights; their mean over the task's tokens is logged."""
        if forward.entropy_BS is None:
            raise RuntimeError(
                "EntropyWeighted: the trainer's loss came without the entropy of the predictions. Use TRL's own loss: drop "
                "compute_loss_func and label_smoothing_factor."
            )
        weight_BS = entropy_weight(forward.entropy_BS, self.alpha, self.full_at)
        mask_BS = forward.label_mask()
        forward.note("weight", (weight_BS * mask_BS).sum(), mask_BS.sum())
        return weight_BS
