"""`slerp`: a point of the arc between two models; see `hf_continual.merging.methods.slerp`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hf_continual.merging.methods.slerp import Slerp
from hf_continual.merging.run import merge_by

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hf_continual.merging.options import OutputOptions
    from hf_continual.merging.result import MergeResult


def slerp(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    t: float = 0.5,
    base: str | os.PathLike[str] | None = None,
    **output: Unpack[OutputOptions],
) -> MergeResult:
    """Interpolate two models on the sphere, tensor by tensor.

    Example:
        >>> slerp("law", "tax", "between", t=0.5)

    Args:
        first: A full model, or a LoRA adapter on `base`.
        second: Another.
        output_dir: Where the result goes; complete or absent.
        t: Share of the way from the first to the second.
        base: The full model that adapters sit on. It is no part of the merge.
        **output: How it is written, see `OutputOptions`. The result has no low rank, so it is a model.

    Returns:
        Where the result is and what it is made of; the report holds the angles.

    Raises:
        ValueError: If an argument does not fit.
        MergeError: If the models do not.
    """
    return merge_by(Slerp(t), [first, second], output_dir, base=base, **output)
