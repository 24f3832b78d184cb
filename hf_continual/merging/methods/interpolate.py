"""From the base to the tuned model and every point between: WiSE-FT (Wortsman et al., CVPR 2022, arXiv 2109.01903).

    theta(alpha) = theta_base + alpha (theta_tuned - theta_base)

alpha = 0 is the base, alpha = 1 the tuned model. What was learnt and what was there before change at different speeds
along the line, so a scan with a gauge for each shows where to stop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from hf_continual.merging.average import Average
from hf_continual.merging.methods.base import MergeMethod, Models, Rules
from hf_continual.merging.passes import Passes
from hf_continual.paper import Paper


@dataclass
class Interpolate(MergeMethod):
    """The model at `alpha` of the way from the base to the tuned one.

    Args:
        alpha: Share of the way; beyond 1 exaggerates what was learnt.

    Raises:
        ValueError: If it is no finite number.
    """

    alpha: float

    name: ClassVar[str] = "interpolate"
    paper: ClassVar[Paper] = Paper(
        "Robust fine-tuning of zero-shot models", "Wortsman et al.", 2022, "2109.01903", "CVPR 2022"
    )
    from_base: ClassVar[bool] = True
    models: ClassVar[tuple[int, int | None]] = (1, 1)
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.alpha, int | float) or not abs(self.alpha) < float("inf"):
            raise ValueError(f"alpha={self.alpha!r}: give a finite number, 0 for the base and 1 for the tuned model.")

    def prepare(self, models: Models, passes: Passes) -> Rules:
        """One weighted sum."""
        rule = Average((1.0 - float(self.alpha), float(self.alpha)))
        return lambda _: rule

    def describe(self, models: Models) -> dict[str, Any]:
        """The share of the way."""
        return {"alpha": float(self.alpha)}
