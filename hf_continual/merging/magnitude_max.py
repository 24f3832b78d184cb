"""`magnitude_max`: per element the largest change; see `hf_continual.merging.methods.magnitude_max`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_continual.merging.methods.magnitude_max import MagnitudeMax
from hf_continual.merging.run import merge_by

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hf_continual.merging.options import OutputOptions
    from hf_continual.merging.result import MergeResult


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
    return merge_by(MagnitudeMax(scale), models, output_dir, base=base, **output)
