"""Weighted averages: model soups (Wortsman et al. 2022), the rule that RECALL and WiSE-FT build on.

    theta = theta_0 + sum_{q >= 1} w_q (theta_q - theta_0),   sum_q w_q = 1

In this form equal models return their own bytes, the rounding error is relative to the differences, and the weights
need not sum to one exactly in fp32.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hf_continual.merging.engine.average import Average
from hf_continual.merging.engine.passes import Passes
from hf_continual.merging.methods.base import MergeMethod, Models, Rules
from hf_continual.merging.pipeline import merge_by
from hf_continual.paper import Paper

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hf_continual.merging.engine.options import OutputOptions
    from hf_continual.merging.engine.result import MergeResult


def normalised(weights: Sequence[float] | None, number: int) -> tuple[float, ...]:
    """Weights that sum to one.

    Args:
        weights: One per model, or None for equal ones.
        number: How many models there are.

    Returns:
        The weights divided by their sum.

    Raises:
        TypeError: If they are not numbers.
        ValueError: If there are too many or too few, or their sum is not positive.
    """
    if weights is None:
        return (1.0 / number,) * number
    if len(weights) != number:
        raise ValueError(
            f"weights={list(weights)!r} has {len(weights)} numbers for {number} models. Give one per model."
        )
    if any(isinstance(w, bool) or not isinstance(w, int | float) for w in weights):
        raise TypeError(f"weights={list(weights)!r}: give numbers, one per model.")
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
        weights: One number per model, divided by their sum; by default equal.
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
        """Check that there is one weight per model, with a positive sum."""
        normalised(self.weights, len(models.members))

    def prepare(self, models: Models, passes: Passes) -> Rules:
        """Return the same average for every tensor."""
        rule = Average(normalised(self.weights, len(models.members)))
        return lambda _: rule

    def describe(self, models: Models) -> dict[str, Any]:
        """The weights that sum to one."""
        return {"weights": list(normalised(self.weights, len(models.members)))}


def merge_linear(
    models: Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    base: str | os.PathLike[str] | None = None,
    **output: Unpack[OutputOptions],
) -> MergeResult:
    """Average checkpoints without loading them.

    Example:
        >>> merge_linear(["me/seed-0", "me/seed-1"], "soup", weights=[0.7, 0.3])
        >>> merge_linear(["law-adapter", "tax-adapter"], "both", base="Qwen/Qwen2.5-0.5B")

    Args:
        models: Full models and LoRA adapters, in any mix: folders or Hub ids (``"id@revision"``).
        output_dir: Output folder; complete or absent.
        weights: One number per model, divided by their sum; by default equal.
        base: The full model that adapters belong to. It is not part of the average.
        **output: Form of the output and how it is written, see `OutputOptions`.

    Returns:
        The output folder, and the report of what it was made from.

    Raises:
        ValueError: If an argument does not fit.
        MergeError: If the models cannot be averaged, or a file changes meanwhile.
    """
    return merge_by(Linear(weights), models, output_dir, base=base, **output)
