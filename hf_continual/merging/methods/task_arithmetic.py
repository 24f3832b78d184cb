"""Adding and subtracting what was learnt (Ilharco et al., ICLR 2023, arXiv 2212.04089).

    theta = theta_base + sum_i lambda_i (theta_i - theta_base)

With lambda_i = 1/N it is the uniform average; the paper tunes one lambda for all tasks on validation data (around 0.3 to 0.5
for eight tasks). A negative lambda unlearns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_continual.merging.average import Average, scales_for
from hf_continual.merging.methods.base import MergeMethod, Models, Rules
from hf_continual.merging.passes import Passes
from hf_continual.paper import Paper


@dataclass
class TaskArithmetic(MergeMethod):
    """Add the changes of several models to their base.

    Args:
        scale: lambda, one for all models or one each; negative to unlearn.
    """

    scale: float | Sequence[float] = 0.5

    name: ClassVar[str] = "task_arithmetic"
    paper: ClassVar[Paper] = Paper(
        "Editing models with task arithmetic", "Ilharco et al.", 2023, "2212.04089", "ICLR 2023"
    )
    from_base: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    def check(self, models: Models) -> None:
        """One scale, or one per model."""
        scales_for(self.scale, len(models.named))

    def prepare(self, models: Models, passes: Passes) -> Rules:
        """A weighted sum; the base has what the models leave of one."""
        scales = scales_for(self.scale, len(models.named))
        rule = Average((1.0 - sum(scales), *scales))
        return lambda _: rule

    def describe(self, models: Models) -> dict[str, Any]:
        """One scale per model."""
        return {"scale": list(scales_for(self.scale, len(models.named)))}
