"""`dare`: add what is left of changes of which most were dropped; see `hf_continual.merging.methods.dare`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_continual.merging.methods.dare import Dare
from hf_continual.merging.run import merge_by

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hf_continual.merging.options import OutputOptions
    from hf_continual.merging.result import MergeResult


def dare(
    models: Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str],
    density: float = 0.1,
    scale: float | Sequence[float] = 0.5,
    seed: int = 0,
    **output: Unpack[OutputOptions],
) -> MergeResult:
    """Drop most of each model's changes at random, rescale the rest, and add it to the base.

    Example:
        >>> dare(["law", "tax"], "both", base="Qwen/Qwen2.5-0.5B", density=0.1)

    Args:
        models: Full models and LoRA adapters in any mix: folders or Hub ids (``"id@revision"``).
        output_dir: Where the result goes; complete or absent.
        base: The full model they were tuned from.
        density: Share of each change that is kept.
        scale: lambda, one for all models or one each.
        seed: Which elements are kept; whatever the merge is cut into, it gives the same bytes.
        **output: How it is written, see `OutputOptions`. The result has no low rank, so it is a model.

    Returns:
        Where the result is and what it is made of.

    Raises:
        ValueError: If an argument does not fit.
        MergeError: If the models do not.
    """
    return merge_by(Dare(density, scale, seed), models, output_dir, base=base, **output)
