"""`merge_linear`: a weighted average; see `hf_continual.merging.methods.linear`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_continual.merging.methods.linear import Linear
from hf_continual.merging.run import merge_by

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hf_continual.merging.options import OutputOptions
    from hf_continual.merging.result import MergeResult


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
        output_dir: Where the result goes; complete or absent.
        weights: One number per model, divided by their sum; by default equal ones.
        base: The full model that adapters sit on. It is no part of the average.
        **output: Form of the output and how it is written, see `OutputOptions`.

    Returns:
        Where the result is and what it is made of.

    Raises:
        ValueError: If an argument does not fit.
        MergeError: If the models cannot be averaged, or a file changes meanwhile.
    """
    return merge_by(Linear(weights), models, output_dir, base=base, **output)
