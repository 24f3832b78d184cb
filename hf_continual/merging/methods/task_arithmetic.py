"""Add and subtract what was learned (Ilharco et al., ICLR 2023, arXiv 2212.04089).

    theta = theta_base + sum_i lambda_i (theta_i - theta_base)

lambda_i = 1/N gives the uniform average; the paper tunes one lambda for all tasks on validation data (around 0.3 to 0.5
for eight tasks). A negative lambda unlearns.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hf_continual.merging.engine.average import Average
from hf_continual.merging.engine.passes import Passes
from hf_continual.merging.engine.task_vectors import scales_for
from hf_continual.merging.methods.base import MergeMethod, Models, Rules
from hf_continual.merging.pipeline import merge_by
from hf_continual.paper import Paper

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hf_continual.merging.engine.options import OutputOptions
    from hf_continual.merging.engine.result import MergeResult


@dataclass
class TaskArithmetic(MergeMethod):
    """Add the changes of several models to their base.

    Args:
        scale: lambda, one value for all models or one per model; negative to unlearn.
    """

    scale: float | Sequence[float] = 0.5

    name: ClassVar[str] = "task_arithmetic"
    paper: ClassVar[Paper] = Paper(
        "Editing models with task arithmetic", "Ilharco et al.", 2023, "2212.04089", "ICLR 2023"
    )
    from_base: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    def check(self, models: Models) -> None:
        """Check that there is one scale, or one per model."""
        scales_for(self.scale, len(models.named))

    def prepare(self, models: Models, passes: Passes) -> Rules:
        """Return a weighted sum; the base's weight is one minus the sum of the others."""
        scales = scales_for(self.scale, len(models.named))
        rule = Average((1.0 - sum(scales), *scales))
        return lambda _: rule

    def describe(self, models: Models) -> dict[str, Any]:
        """One scale per model."""
        return {"scale": list(scales_for(self.scale, len(models.named)))}


def task_arithmetic(
    models: Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str],
    scale: float | Sequence[float] = 0.5,
    **output: Unpack[OutputOptions],
) -> MergeResult:
    """Add the task vectors of several models to their base.

    Example:
        >>> task_arithmetic(["law", "tax"], "both", base="Qwen/Qwen2.5-0.5B", scale=0.5)

    Args:
        models: Full models and LoRA adapters in any mix: folders or Hub ids (``"id@revision"``).
        output_dir: Output folder; complete or absent.
        base: The full model that they were fine-tuned from.
        scale: lambda, one value for all models or one per model; negative to unlearn.
        **output: Form of the output and how it is written, see `OutputOptions`.

    Returns:
        The output folder, and the report of what it was made from.

    Raises:
        ValueError: If an argument does not fit.
        MergeError: If the models do not fit.
    """
    return merge_by(TaskArithmetic(scale), models, output_dir, base=base, **output)
