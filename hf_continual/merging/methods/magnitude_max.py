"""Keep, per element, the largest change (MagMax: Marczak et al., ECCV 2024, arXiv 2407.06322).

    tau = tau_i with i = argmax_i |tau_i|,  theta = theta_base + lambda tau

Made for models fine-tuned one after the other, whose important changes stay large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_continual.merging.average import scales_for
from hf_continual.merging.methods.base import MergeMethod, Models, Rules
from hf_continual.merging.passes import Passes
from hf_continual.paper import Paper


@dataclass(frozen=True)
class LargestChange:
    """The rule on the values of the base and the tuned models.

    Args:
        scale: lambda.
    """

    scale: float = 1.0

    def __call__(self, values: Sequence[Tensor], at: Any = None) -> Tensor:
        """Keep the largest change, overwriting the values.

        Args:
            values: Base first, then the models. Of equal magnitudes the earlier model's change is kept.
            at: Where they are; of no matter here.

        Returns:
            The result, in the memory of the base.
        """
        base, *others = values
        largest = others[0].sub_(base)
        for other in others[1:]:
            change = other.sub_(base)
            torch.where(change.abs() > largest.abs(), change, largest, out=largest)
        return base.add_(largest, alpha=self.scale)


@dataclass
class MagnitudeMax(MergeMethod):
    """Merge models by the largest change of each element.

    Args:
        scale: lambda, applied to the merged change.
    """

    scale: float = 1.0

    name: ClassVar[str] = "magnitude_max"
    paper: ClassVar[Paper] = Paper(
        "MagMax: Leveraging Model Merging for Seamless Continual Learning",
        "Marczak et al.",
        2024,
        "2407.06322",
        "ECCV 2024",
    )
    from_base: ClassVar[bool] = True

    def prepare(self, models: Models, passes: Passes) -> Rules:
        """The same rule for every tensor."""
        rule = LargestChange(scales_for(self.scale, 1)[0])
        return lambda _: rule

    def describe(self, models: Models) -> dict[str, Any]:
        """The scale."""
        return {"scale": scales_for(self.scale, 1)[0]}
