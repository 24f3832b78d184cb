"""`merge`: every merge method, by its name or as your own `MergeMethod`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from hf_continual.merging.engine.options import Output
from hf_continual.merging.engine.result import MergeResult
from hf_continual.merging.methods.base import MergeMethod
from hf_continual.merging.methods.table import build_merge
from hf_continual.merging.pipeline import merge_by


def merge(
    method: MergeMethod | str,
    models: Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    **options: Any,
) -> MergeResult:
    """Merge checkpoints without loading them.

    Every check comes first, then the passes that read values, then the output, which is complete or absent. If interrupted, the
    same call resumes; called again after it has finished, it returns the existing result.

    Example:
        >>> merge("ties", ["law", "tax"], "both", base="Qwen/Qwen2.5-0.5B", density=0.2)
        >>> merge(MyRule(strength=2), ["law", "tax"], "both", base="Qwen/Qwen2.5-0.5B")

    Args:
        method: A name: ``recall``, ``kif``, ``linear``, ``interpolate``, ``slerp``, ``task_arithmetic``, ``ties``, ``dare``,
            ``dare_ties``, ``della``, ``breadcrumbs``, ``consensus``, ``fapm``, ``magnitude_max``, ``model_stock``, or
            ``"package.module:Class"``; or a `MergeMethod`.
        models: Full models and LoRA adapters, in any mix: folders or Hub ids (``"id@revision"``), oldest first.
        output_dir: Output folder; complete or absent.
        base: The full model that adapters belong to, or that changes are measured from.
        **options: Hyper-parameters of the method, if it is given by name; and how the output is written, see `OutputOptions`.

    Returns:
        The output folder, and the report of what it was made from.

    Raises:
        TypeError: If an option does not exist.
        ValueError: If an argument does not fit.
        MergeError: If the models do not fit, or a file changes meanwhile.
        FileExistsError: If the output folder is in use.
        OSError: If the disk is full.
    """
    shared = {f.name for f in fields(Output)}
    own = {} if isinstance(method, MergeMethod) else {k: v for k, v in options.items() if k not in shared}
    output = {k: v for k, v in options.items() if k not in own}
    return merge_by(build_merge(method, own), models, output_dir, base=base, **output)
