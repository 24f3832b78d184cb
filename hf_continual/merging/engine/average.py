"""The weighted average as a rule, in the form that is exact where models agree.

theta = theta_0 + sum_{q >= 1} w_q (theta_q - theta_0),   sum_q w_q = 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Average:
    """The weighted average as a rule on the values of all models.

    Args:
        weights: One per model; assumed to sum to one, so the first is not read.
    """

    weights: tuple[float, ...]

    def __call__(self, values: Sequence[Tensor], at: Any = None) -> Tensor:
        """Average, overwriting the values.

        Args:
            values: The models' values of one range, first model first.
            at: Their position; unused.

        Returns:
            The average, in the first tensor's memory.
        """
        first, *others = values
        # Take the differences before the first changes.
        moved = [other.sub_(first) for other in others]
        for weight, difference in zip(self.weights[1:], moved, strict=True):
            first.add_(difference, alpha=weight)
        return first
