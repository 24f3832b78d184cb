"""Weighted averages: model soups (Wortsman et al. 2022), the rule that RECALL and WiSE-FT are made of.

    theta = theta_0 + sum_{q >= 1} w_q (theta_q - theta_0),   sum_q w_q = 1

In this form equal models give their own bytes back, the rounding error is relative to what differs, and the weights
need not sum to one exactly in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_continual.merging.average import Average
from hf_continual.merging.methods.base import MergeMethod, Models, Rules
from hf_continual.merging.passes import Passes
from hf_continual.paper import Paper


def normalised(weights: Sequence[float] | None, number: int) -> tuple[float, ...]:
    """Weights that sum to one.

    Args:
        weights: One per model, or None for equal ones.
        number: How many models there are.

    Returns:
        The weights divided by their sum.

    Raises:
        ValueError: If their number or their sum is wrong.
    """
    if weights is None:
        return (1.0 / number,) * number
    if len(weights) != number:
        raise ValueError(
            f"weights={list(weights)!r} has {len(weights)} numbers for {number} models. Give one for each."
        )
    total = float(sum(weights))
    if not total > 0 or total == float("inf"):
        raise ValueError(
            f"weights={list(weights)!r} sum to {total}; an average needs a positive sum. To add or subtract task vectors, "
            f"use task_arithmetic."
        )
    return tuple(float(w) / total for w in weights)


@dataclass
class Linear(MergeMethod):
    """Average models.

    Args:
        weights: One number per model, divided by their sum; by default equal ones.
    """

    weights: Sequence[float] | None = None

    name: ClassVar[str] = "linear"
    paper: ClassVar[Paper] = Paper(
        "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time",
        "Wortsman et al.",
        2022,
        "2203.05482",
        "ICML 2022",
    )
    linear: ClassVar[bool] = True

    def check(self, models: Models) -> None:
        """One weight per model, with a sum."""
        normalised(self.weights, len(models.members))

    def prepare(self, models: Models, passes: Passes) -> Rules:
        """The same average for every tensor."""
        rule = Average(normalised(self.weights, len(models.members)))
        return lambda _: rule

    def describe(self, models: Models) -> dict[str, Any]:
        """The weights that sum to one."""
        return {"weights": list(normalised(self.weights, len(models.members)))}
