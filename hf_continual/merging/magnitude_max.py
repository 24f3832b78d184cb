"""Keep, per element, the largest change (MagMax: Marczak et al., ECCV 2024, arXiv 2407.06322).

    tau = tau_i with i = argmax_i |tau_i|,  theta = theta_base + lambda tau

Made for models fine-tuned one after the other, whose important changes stay large.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_continual.merging.job import Job
from hf_continual.merging.members import open_from_base
from hf_continual.merging.run import run_job
from hf_continual.merging.task_arithmetic import scales_for
from hf_continual.paper import Paper

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hf_continual.merging.options import OutputOptions
    from hf_continual.merging.result import MergeResult

PAPER = Paper(
    "MagMax: Leveraging Model Merging for Seamless Continual Learning",
    "Marczak et al.",
    2024,
    "2407.06322",
    "ECCV 2024",
)


@dataclass(frozen=True)
class LargestChange:
    """The rule on the values of the base and the tuned models.

    Args:
        scale: lambda.
    """

    scale: float = 1.0

    def __call__(self, values: Sequence[Tensor]) -> Tensor:
        """Keep the largest change, overwriting the values.

        Args:
            values: Base first, then the models. Of equal magnitudes the earlier model's change is kept.

        Returns:
            The result, in the memory of the base.
        """
        base, *others = values
        largest = others[0].sub_(base)
        for other in others[1:]:
            change = other.sub_(base)
            torch.where(change.abs() > largest.abs(), change, largest, out=largest)
        return base.add_(largest, alpha=self.scale)


def magnitude_max(
    models: Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str],
    scale: float = 1.0,
    **output: Unpack[OutputOptions],
) -> MergeResult:
    """Merge models by the largest change of each element.

    Args:
        models: Full models and LoRA adapters in any mix: folders or Hub ids (``"id@revision"``).
        output_dir: Where the result goes; complete or absent.
        base: The full model they were tuned from.
        scale: lambda, applied to the merged change.
        **output: How it is written, see `OutputOptions`. The result has no low rank, so it is a model.

    Returns:
        Where the result is and what it is made of.

    Raises:
        ValueError: If an argument does not fit.
        MergeError: If the models do not.
    """
    members, full = open_from_base(models, base, output.get("quantized_base", "original"))
    (scale,) = scales_for(scale, 1)
    job = Job("magnitude_max", PAPER, members, full, lambda _: LargestChange(scale), {"scale": scale})
    return run_job(job, Path(output_dir), output)
