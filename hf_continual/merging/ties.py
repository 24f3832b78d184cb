"""TIES: trim, elect a sign, average what agrees (Yadav et al., NeurIPS 2023, arXiv 2306.01708).

    trim    of each task vector tau_i keep the `density` largest magnitudes, over the whole model; the rest is 0
    elect   gamma = sign(sum_i tau_i), per element
    merge   tau = mean of those tau_i that are not 0 and have the sign gamma
    theta = theta_base + lambda tau

The paper keeps 20 % and uses lambda = 1. The thresholds are found exactly by two passes over the weights, so a merge
reads its inputs three times.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_continual.merging.chunks import chunks
from hf_continual.merging.job import Job
from hf_continual.merging.members import Member, open_from_base
from hf_continual.merging.model_output import model_tensors
from hf_continual.merging.options import read_output
from hf_continual.merging.publishing import check_push
from hf_continual.merging.run import finished_already, run_job
from hf_continual.merging.task_arithmetic import scales_for
from hf_continual.merging.threshold import kth_largest
from hf_continual.merging.workplace import check_free
from hf_continual.paper import Paper

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hf_continual.merging.options import OutputOptions
    from hf_continual.merging.result import MergeResult

PAPER = Paper(
    "TIES-Merging: Resolving Interference When Merging Models", "Yadav et al.", 2023, "2306.01708", "NeurIPS 2023"
)


@dataclass(frozen=True)
class TrimElectMerge:
    """The rule on the values of the base and the tuned models.

    Args:
        thresholds: Smallest magnitude of each model's change that is kept.
        scale: lambda.
    """

    thresholds: tuple[float, ...]
    scale: float = 1.0

    def __call__(self, values: Sequence[Tensor]) -> Tensor:
        """Trim, elect and merge, overwriting the values.

        Args:
            values: Base first, then the models.

        Returns:
            The result, in the memory of the base.
        """
        base, *others = values
        total = torch.zeros_like(base)
        changes = []
        for other, threshold in zip(others, self.thresholds, strict=True):
            change = other.sub_(base)
            change.masked_fill_(change.abs() < threshold, 0.0)
            total.add_(change)
            changes.append(change)
        elected = total.sign()
        kept, count = total.zero_(), torch.zeros_like(base)
        for change in changes:
            agrees = change.sign() == elected
            agrees &= change != 0
            kept.add_(change.mul_(agrees))
            count.add_(agrees)
        return base.add_(kept.div_(count.clamp_(min=1.0)), alpha=self.scale)


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
    if not 0 < density <= 1:
        raise ValueError(f"density={density}: it is a share, above 0 and at most 1.")
    everyone, full = open_from_base(models, base, output.get("quantized_base", "original"))
    (scale,) = scales_for(scale, 1)
    facts = {"density": density, "scale": scale}
    # Every check comes before the passes that look for thresholds.
    planned = Job("ties", PAPER, everyone, full, lambda _: TrimElectMerge((), scale), facts)
    checked, target = read_output(output), Path(output_dir)
    if finished_already(planned, target, checked):
        return run_job(planned, target, output)
    check_free(target, checked.overwrite)
    check_push(planned, checked, "model")
    thresholds = (0.0,) * (len(everyone) - 1) if checked.dry_run else trim_thresholds(everyone, density)
    rule = TrimElectMerge(thresholds, scale)
    job = Job("ties", PAPER, everyone, full, lambda _: rule, facts, facts={"thresholds": list(thresholds)})
    return run_job(job, target, output)


def trim_thresholds(members: Sequence[Member], density: float) -> tuple[float, ...]:
    """The magnitude that the `density` largest changes of each model reach.

    A task vector is made of all tensors that are stored anew or adapted; what an adapter shares with its base is none
    of it.

    Args:
        members: Base first, then the models.
        density: Share of elements that is kept.

    Returns:
        One threshold per model; 0 keeps all.
    """
    return tuple(_threshold([members[0], member], density) for member in members[1:])


def _threshold(pair: Sequence[Member], density: float) -> float:
    def change(values: Sequence[Tensor]) -> Tensor:
        return values[1].sub_(values[0]).abs_()

    tensors = [t for t in model_tensors(pair, lambda _: change, None, "strict", []) if t.parts[0].function is not None]

    def passes() -> Iterator[Tensor]:
        for _, part, chunk in chunks(tensors):
            assert part.function is not None
            yield part.function(chunk)

    total = sum(prod(t.shape) for t in tensors)
    kth = max(1, round(density * total))
    return 0.0 if kth >= total else kth_largest(passes, kth)
