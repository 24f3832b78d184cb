"""`task_arithmetic`: adding and subtracting what was learnt; see `hf_continual.merging.methods.task_arithmetic`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_continual.merging.methods.task_arithmetic import TaskArithmetic
from hf_continual.merging.run import merge_by

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hf_continual.merging.options import OutputOptions
    from hf_continual.merging.result import MergeResult


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
    return merge_by(TaskArithmetic(scale), models, output_dir, base=base, **output)
