"""Keep, per element, the largest change (MagMax: Marczak et al., ECCV 2024, arXiv 2407.06322).

    tau = tau_i with i = argmax_i |tau_i|,  theta = theta_base + lambda tau

Made for models fine-tuned one after another, whose important changes stay large.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hf_continual.merging.engine.passes import Passes
from hf_continual.merging.engine.task_vectors import scales_for
from hf_continual.merging.methods.base import MergeMethod, Models, Rules
from hf_continual.merging.pipeline import merge_by
from hf_continual.paper import Paper

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hf_continual.merging.engine.options import OutputOptions
    from hf_continual.merging.engine.result import MergeResult


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
            values: Base first, then the models. Among equal magnitudes, the earlier model's change is kept.
            at: Their position; unused.

        Returns:
            The result, in the base's memory.
        """
        base, *others = values
        largest = others[0].sub_(base)
        for other in others[1:]:
            change = other.sub_(base)
            torch.where(change.abs() > largest.abs(), change, largest, out=largest)
        return base.add_(largest, alpha=self.scale)


@dataclass
class MagnitudeMax(MergeMethod):
    """Keep the largest change of each element.

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
        """Return the same rule for every tensor."""
        rule = LargestChange(scales_for(self.scale, 1)[0])
        return lambda _: rule

    def describe(self, models: Models) -> dict[str, Any]:
        """The scale."""
        return {"scale": scales_for(self.scale, 1)[0]}


def magnitude_max(
    models: Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str],
    scale: float = 1.0,
    **output: Unpack[OutputOptions],
) -> MergeResult:
    """Merge models, keeping the largest change of each element.

    Args:
        models: Full models and LoRA adapters in any mix: folders or Hub ids (``"id@revision"``).
        output_dir: Output folder; complete or absent.
        base: The full model that they were fine-tuned from.
        scale: lambda, applied to the merged change.
        **output: How it is written, see `OutputOptions`. The result is not low-rank, so it is a full model.

    Returns:
        The output folder, and the report of what it was made from.

    Raises:
        ValueError: If an argument does not fit.
        MergeError: If the models do not fit.
    """
    return merge_by(MagnitudeMax(scale), models, output_dir, base=base, **output)
