"""Model Breadcrumbs: changes without their largest and their smallest (Davari and Belilovsky, ECCV 2024, arXiv 2312.06795).

    of each task vector, tensor by tensor: 0 where |tau| is among the `outliers` largest, or not among the next `density` largest
    theta = theta_base + lambda sum_i tau'_i

The largest changes are outliers that break other tasks, the smallest are noise. The paper drops the smallest 85 to 90 % and
the largest 1 to 3 %, and tunes one lambda (0.3 to 0.5) for all numbers of tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from hf_continual.bounds import number
from hf_continual.merging.engine.passes import Passes
from hf_continual.merging.engine.room import Room
from hf_continual.merging.engine.task_vectors import scales_for
from hf_continual.merging.engine.threshold import drop_below, largest_of_each
from hf_continual.merging.inputs.members import Member
from hf_continual.merging.methods.base import MergeMethod, Models, Rule, Rules
from hf_continual.paper import Paper

Band = tuple[float, float]


@dataclass(frozen=True)
class AddBand:
    """The rule on the values of the base and the tuned models.

    Args:
        bands: For each model, the smallest magnitude of a change that is kept, and the smallest that is an outlier.
        scales: lambda of each model.
    """

    bands: tuple[Band, ...]
    scales: tuple[float, ...]
    _room: Room = field(default_factory=Room, init=False, repr=False, compare=False)

    def __call__(self, values: Sequence[Tensor], at: Any = None) -> Tensor:
        """Add the changes inside the band, overwriting the values.

        Args:
            values: Base first, then the models.
            at: Their position; unused.

        Returns:
            The result, in the base's memory.
        """
        base, *others = values
        changes = [other.sub_(base) for other in others]
        for change, (low, high), scale in zip(changes, self.bands, self.scales, strict=True):
            if high < float("inf"):
                # Subtract outliers from themselves, and 0 from smaller changes.
                change.sub_(drop_below(change, high, out=self._room.like(change, "outliers")))
            base.add_(drop_below(change, low, out=change), alpha=scale)
        return base


@dataclass
class Breadcrumbs(MergeMethod):
    """Add the changes of medium magnitude of several models to their base.

    Args:
        density: Fraction of each tensor's changes that is kept.
        outliers: Fraction of the largest changes that is dropped.
        scale: lambda, one value for all models or one per model.

    Raises:
        ValueError: If a fraction is out of range, or nothing is left.
    """

    density: float = 0.1
    outliers: float = 0.01
    scale: float | Sequence[float] = 0.3
    _bands: dict[str, list[list[float]]] = field(default_factory=dict, init=False, repr=False)

    name: ClassVar[str] = "breadcrumbs"
    paper: ClassVar[Paper] = Paper(
        "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
        "Davari and Belilovsky",
        2024,
        "2312.06795",
        "ECCV 2024",
    )
    from_base: ClassVar[bool] = True
    looks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number(self.name, "density", self.density)
        number(self.name, "outliers", self.outliers)
        if not (0 < self.density and 0 <= self.outliers and self.density + self.outliers <= 1):
            raise ValueError(
                f"density={self.density} and outliers={self.outliers}: both are fractions of the same changes, so their sum must be at most 1."
            )

    def check(self, models: Models) -> None:
        """Check that there is one scale, or one per model."""
        scales_for(self.scale, len(models.named))

    def prepare(self, models: Models, passes: Passes) -> Rules:
        """Find two thresholds for each tensor of each model."""
        self._bands = passes.once("bands", lambda: self._look(models, passes))
        scales = scales_for(self.scale, len(models.named))
        everything = AddBand(((0.0, float("inf")),) * len(scales), scales)

        def rule_for(name: str) -> Rule:
            found = self._bands.get(name)
            return everything if found is None else AddBand(tuple((low, high) for low, high in found), scales)

        return rule_for

    def _look(self, models: Models, passes: Passes) -> dict[str, list[list[float]]]:
        found: dict[str, list[list[float]]] = {}
        for place, member in enumerate(models.named):
            for name, band in bands([models.members[0], member], self.density, self.outliers, passes).items():
                found.setdefault(name, [[0.0, float("inf")] for _ in models.named])[place] = list(band)
        return found

    def facts(self) -> Mapping[str, Any]:
        """The number of tensors with thresholds; the thresholds themselves are many."""
        return {"tensors_with_bands": len(self._bands)}

    def describe(self, models: Models) -> dict[str, Any]:
        """Fractions and scales."""
        scales = list(scales_for(self.scale, len(models.named)))
        return {"density": self.density, "outliers": self.outliers, "scale": scales}


def bands(pair: Sequence[Member], density: float, outliers: float, passes: Passes) -> dict[str, Band]:
    """Find the magnitudes between which the changes of each tensor are kept.

    Args:
        pair: Base and model.
        density: Fraction that is kept.
        outliers: Fraction of the largest that is dropped.
        passes: Runs the passes.

    Returns:
        The bands by name, for tensors that differ.
    """
    tensors = passes.tensors(pair, lambda values, at: values[1].sub_(values[0]).abs_())
    totals = {t.name: passes.elements([t]) for t in tensors}
    ranks = {
        name: (round(outliers * total), max(1, round((density + outliers) * total))) for name, total in totals.items()
    }
    found = largest_of_each(
        lambda: ((at.name, piece) for at, piece in passes.over(tensors)),
        {name: [max(1, top), last] for name, (top, last) in ranks.items()},
    )
    return {
        name: (0.0 if last >= totals[name] else found[name][1], found[name][0] if top else float("inf"))
        for name, (top, last) in ranks.items()
    }
