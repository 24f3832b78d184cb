"""Adding and subtracting what was learnt (Ilharco et al., ICLR 2023, arXiv 2212.04089).

    theta = theta_base + sum_i lambda_i (theta_i - theta_base)

With lambda_i = 1/N it is the uniform average; the paper tunes one lambda for all tasks on validation data (around 0.3 to 0.5
for eight tasks). A negative lambda unlearns.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_continual.merging.average import Average
from hf_continual.merging.job import Job
from hf_continual.merging.members import open_from_base
from hf_continual.merging.run import run_job
from hf_continual.paper import Paper

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hf_continual.merging.options import OutputOptions
    from hf_continual.merging.result import MergeResult

PAPER = Paper("Editing models with task arithmetic", "Ilharco et al.", 2023, "2212.04089", "ICLR 2023")


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
        output_dir: Where the result goes; complete or absent.
        base: The full model they were tuned from.
        scale: lambda, one for all models or one each; negative to unlearn.
        **output: Form of the output and how it is written, see `OutputOptions`.

    Returns:
        Where the result is and what it is made of.

    Raises:
        ValueError: If an argument does not fit.
        MergeError: If the models do not.
    """
    members, full = open_from_base(models, base, output.get("quantized_base", "original"))
    scales = scales_for(scale, len(members) - 1)
    rule = Average((1.0 - sum(scales), *scales))
    job = Job("task_arithmetic", PAPER, members, full, lambda _: rule, {"scale": list(scales)})
    return run_job(job, Path(output_dir), output)


def scales_for(scale: float | Sequence[float], number: int) -> tuple[float, ...]:
    """One coefficient per model.

    Args:
        scale: One for all, or one each.
        number: How many models there are.

    Returns:
        The coefficients.

    Raises:
        ValueError: If their number is wrong or one is not finite.
    """
    scales = (float(scale),) * number if isinstance(scale, int | float) else tuple(float(s) for s in scale)
    if len(scales) != number:
        raise ValueError(
            f"scale={list(scales)} has {len(scales)} numbers for {number} models. Give one, or one for each."
        )
    if not all(abs(s) < float("inf") for s in scales):
        raise ValueError(f"scale={list(scales)}: all must be finite.")
    return scales
