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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from hf_continual.merging.engine.passes import Passes
from hf_continual.merging.engine.room import Room
from hf_continual.merging.engine.task_vectors import check_density, elect_and_merge, scales_for
from hf_continual.merging.engine.threshold import drop_below, kth_largest
from hf_continual.merging.inputs.members import Member
from hf_continual.merging.methods.base import MergeMethod, Models, Rules
from hf_continual.merging.pipeline import merge_by
from hf_continual.paper import Paper

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hf_continual.merging.engine.options import OutputOptions
    from hf_continual.merging.engine.result import MergeResult


@dataclass(frozen=True)
class TrimElectMerge:
    """The rule on the values of the base and the tuned models.

    Args:
        thresholds: Smallest magnitude of each model's change that is kept.
        scale: lambda.
    """

    thresholds: tuple[float, ...]
    scale: float = 1.0
    _room: Room = field(default_factory=Room, init=False, repr=False, compare=False)

    def __call__(self, values: Sequence[Tensor], at: Any = None) -> Tensor:
        """Trim, elect and merge, overwriting the values.

        Args:
            values: Base first, then the models.
            at: Their position; unused.

        Returns:
            The result, in the base's memory.
        """
        base, *others = values
        changes = []
        for other, threshold in zip(others, self.thresholds, strict=True):
            change = other.sub_(base)
            drop_below(change, threshold, out=change)
            changes.append(change)
        return elect_and_merge(base, changes, self.scale, self._room)


@dataclass
class Ties(MergeMethod):
    """Trim changes to the largest, elect a sign per element, and average the changes that agree.

    Args:
        density: Fraction of each task vector that is kept. Elements that equal the threshold are kept too.
        scale: lambda, applied to the merged change.

    Raises:
        ValueError: If the density is not a fraction.
    """

    density: float = 0.2
    scale: float = 1.0
    _thresholds: tuple[float, ...] = field(default=(), init=False, repr=False)

    name: ClassVar[str] = "ties"
    paper: ClassVar[Paper] = Paper(
        "TIES-Merging: Resolving Interference When Merging Models", "Yadav et al.", 2023, "2306.01708", "NeurIPS 2023"
    )
    from_base: ClassVar[bool] = True
    looks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_density(self.name, self.density)
        scales_for(self.scale, 1)

    def prepare(self, models: Models, passes: Passes) -> Rules:
        """Find thresholds over the whole of each task vector."""
        found = passes.once("thresholds", lambda: list(trim_thresholds(models.members, self.density, passes)))
        self._thresholds = tuple(found)
        rule = TrimElectMerge(self._thresholds, float(self.scale))
        return lambda _: rule

    def facts(self) -> Mapping[str, Any]:
        """The thresholds."""
        return {"thresholds": list(self._thresholds)}

    def describe(self, models: Models) -> dict[str, Any]:
        """Density and scale."""
        return {"density": self.density, "scale": float(self.scale)}


def trim_thresholds(members: Sequence[Member], density: float, passes: Passes | None = None) -> tuple[float, ...]:
    """Find the magnitude that the `density` largest changes of each model reach.

    A task vector consists of all tensors that are stored separately or adapted; tensors that an adapter shares with its base
    are not part of it.

    Args:
        members: Base first, then the models.
        density: Fraction of elements that is kept.
        passes: Runs the passes.

    Returns:
        One threshold per model; 0 keeps all.
    """
    passes = passes or Passes()
    return tuple(_threshold(passes, [members[0], member], density) for member in members[1:])


def _threshold(passes: Passes, pair: Sequence[Member], density: float) -> float:
    tensors = passes.tensors(pair, lambda values, at: values[1].sub_(values[0]).abs_())
    total = passes.elements(tensors)
    kth = max(1, round(density * total))
    return 0.0 if kth >= total else kth_largest(lambda: (found for _, found in passes.over(tensors)), kth)


def ties(
    models: Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str],
    density: float = 0.2,
    scale: float = 1.0,
    **output: Unpack[OutputOptions],
) -> MergeResult:
    """Merge models by TIES: trim changes, elect a sign per element, average the changes that agree.

    Args:
        models: Full models and LoRA adapters in any mix: folders or Hub ids (``"id@revision"``).
        output_dir: Output folder; complete or absent.
        base: The full model that they were fine-tuned from.
        density: Fraction of each task vector that is kept. Elements that equal the threshold are kept too.
        scale: lambda, applied to the merged change.
        **output: How it is written, see `OutputOptions`. The result is not low-rank, so it is a full model.

    Returns:
        The output folder, and the report of what it was made from; the report holds the thresholds.

    Raises:
        ValueError: If an argument does not fit.
        MergeError: If the models do not fit.
    """
    return merge_by(Ties(density, scale), models, output_dir, base=base, **output)
