"""`ties` and `dare_ties`; see `hf_continual.merging.methods.ties` and `hf_continual.merging.methods.dare`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_continual.merging.methods.dare import DareTies
from hf_continual.merging.methods.ties import Ties
from hf_continual.merging.run import merge_by

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hf_continual.merging.options import OutputOptions
    from hf_continual.merging.result import MergeResult


def ties(
    models: Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str],
    density: float = 0.2,
    scale: float = 1.0,
    **output: Unpack[OutputOptions],
) -> MergeResult:
    """Merge models by TIES.

    Args:
        models: Full models and LoRA adapters in any mix: folders or Hub ids (``"id@revision"``).
        output_dir: Where the result goes; complete or absent.
        base: The full model they were tuned from.
        density: Share of each task vector that is kept. Elements that equal the threshold are kept too.
        scale: lambda, applied to the merged change.
        **output: How it is written, see `OutputOptions`. The result has no low rank, so it is a model.

    Returns:
        Where the result is and what it is made of; the report holds the thresholds.

    Raises:
        ValueError: If an argument does not fit.
        MergeError: If the models do not.
    """
    return merge_by(Ties(density, scale), models, output_dir, base=base, **output)


def dare_ties(
    models: Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str],
    density: float = 0.1,
    scale: float = 1.0,
    seed: int = 0,
    **output: Unpack[OutputOptions],
) -> MergeResult:
    """Merge models by TIES on changes of which most were dropped at random, by DARE.

    Args:
        models: Full models and LoRA adapters in any mix: folders or Hub ids (``"id@revision"``).
        output_dir: Where the result goes; complete or absent.
        base: The full model they were tuned from.
        density: Share of each change that is kept.
        scale: lambda, applied to the merged change.
        seed: Which elements are kept; whatever the merge is cut into, it gives the same bytes.
        **output: How it is written, see `OutputOptions`. The result has no low rank, so it is a model.

    Returns:
        Where the result is and what it is made of.

    Raises:
        ValueError: If an argument does not fit.
        MergeError: If the models do not.
    """
    return merge_by(DareTies(density, scale, seed), models, output_dir, base=base, **output)
