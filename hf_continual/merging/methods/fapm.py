r"""FAPM: keep changes that are large, but not large relative to their weight (Huang et al., EMNLP 2025, arXiv 2509.08255).

    S = |delta| - mean(|theta_base|) |delta| / |theta_base|         per element; the mean is over the tensor
    theta = theta_base + sum_i lambda_i delta_i  where S is among the `density` largest of its tensor

A small weight that changed much is forgetting rather than learning: S > 0 only where the weight is larger than the mean of its
tensor. The paper prunes one fine-tuned model, keeps 10 % of every tensor, and needs neither data nor training. A weight of exactly
zero is kept last. S is computed in fp32 here; the authors' code has it in bf16, where many scores are equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_continual.merging.engine.chunks import Chunk, OutputTensor
from hf_continual.merging.engine.passes import Passes
from hf_continual.merging.engine.room import Room
from hf_continual.merging.engine.task_vectors import check_density, scales_for
from hf_continual.merging.engine.threshold import largest_of_each
from hf_continual.merging.inputs.members import Member
from hf_continual.merging.methods.base import MergeMethod, Models, Rule, Rules
from hf_continual.paper import Paper

PIECE = (
    4096  # elements summed at a time: every chunk begins at a multiple of it, so that all sums are of the same pieces
)


def scores(change: Tensor, base: Tensor, mean: float, out: Tensor, room: Room) -> Tensor:
    """S of each element.

    Args:
        change: A model's change.
        base: Values of the base.
        mean: Mean magnitude of the base's tensor.
        out: Where the scores go, fp32.
        room: Scratch memory.

    Returns:
        The scores, -inf where the base is zero; fp32.
    """
    # |delta| (1 - mean / |base|). For a base of zero this is -inf, or nan if nothing changed: either way it is kept last.
    sizes = torch.abs(change.float(), out=room.take("sizes", change.numel(), torch.float32))
    torch.abs(base.float(), out=out).reciprocal_().mul_(-mean).add_(1.0).mul_(sizes)
    return out.nan_to_num_(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


@dataclass(frozen=True)
class AddBest:
    """The rule on the values of the base and the tuned models.

    Args:
        mean: Mean magnitude of the base's tensor.
        thresholds: Smallest score of each model's change that is kept.
        scales: lambda of each model.
    """

    mean: float
    thresholds: tuple[float, ...]
    scales: tuple[float, ...]
    _room: Room = field(default_factory=Room, init=False, repr=False, compare=False)

    def __call__(self, values: Sequence[Tensor], at: Any = None) -> Tensor:
        """Add the changes with the highest scores, overwriting the values.

        Args:
            values: Base first, then the models.
            at: Their position; unused.

        Returns:
            The result, in the base's memory.
        """
        base, *others = values
        changes = [other.sub_(base) for other in others]
        kept = [
            scores(change, base, self.mean, self._room.take(str(i), base.numel(), torch.float32), self._room).ge_(
                threshold
            )
            for i, (change, threshold) in enumerate(zip(changes, self.thresholds, strict=True))
        ]
        for change, keep, scale in zip(changes, kept, self.scales, strict=True):
            base.add_(change.mul_(keep), alpha=scale)
        return base


@dataclass
class FAPM(MergeMethod):
    """Keep the changes that are large, but not large relative to their weight.

    Args:
        density: Fraction of each tensor's changes that is kept. Elements that equal the threshold are kept too.
        scale: lambda, one value for all models or one per model.

    Raises:
        ValueError: If the density is not a fraction.
    """

    density: float = 0.1
    scale: float | Sequence[float] = 1.0
    _found: dict[str, dict[str, Any]] = field(default_factory=dict, init=False, repr=False)

    name: ClassVar[str] = "fapm"
    paper: ClassVar[Paper] = Paper(
        "Mitigating Catastrophic Forgetting in Large Language Models with Forgetting-aware Pruning",
        "Huang et al.",
        2025,
        "2509.08255",
        "EMNLP 2025",
    )
    from_base: ClassVar[bool] = True
    looks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_density(self.name, self.density)

    def check(self, models: Models) -> None:
        """Check that there is one scale, or one per model."""
        scales_for(self.scale, len(models.named))

    def prepare(self, models: Models, passes: Passes) -> Rules:
        """Find the mean of each tensor of the base, and a threshold for each model."""
        self._found = passes.once("scores", lambda: self._look(models, passes))
        scales = scales_for(self.scale, len(models.named))
        everything = AddBest(0.0, (-math.inf,) * len(scales), scales)

        def rule_for(name: str) -> Rule:
            found = self._found.get(name)
            return everything if found is None else AddBest(found["mean"], tuple(found["thresholds"]), scales)

        return rule_for

    def _look(self, models: Models, passes: Passes) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for place, member in enumerate(models.named):
            for name, (mean, threshold) in thresholds([models.members[0], member], self.density, passes).items():
                entry = found.setdefault(name, {"mean": mean, "thresholds": [-math.inf for _ in models.named]})
                entry["thresholds"][place] = threshold
        return found

    def facts(self) -> Mapping[str, Any]:
        """The number of tensors with thresholds; the thresholds themselves are many."""
        return {"tensors_with_thresholds": len(self._found)}

    def describe(self, models: Models) -> dict[str, Any]:
        """Fraction and scales."""
        return {"density": self.density, "scale": list(scales_for(self.scale, len(models.named)))}


def thresholds(pair: Sequence[Member], density: float, passes: Passes) -> dict[str, tuple[float, float]]:
    """Find the mean magnitude of each tensor of the base, and the score that the `density` best changes reach.

    Args:
        pair: Base and model.
        density: Fraction that is kept.
        passes: Runs the passes: one for the means, two for the scores, and two more over tensors in which fewer than that
            fraction scores above zero.

    Returns:
        Mean and threshold by name, for tensors that differ; a threshold of -inf keeps all.
    """
    means = means_of(passes.tensors(pair, lambda values, at: values[0].abs_()), passes)
    room = Room()

    def look(values: Sequence[Tensor], at: Chunk) -> Tensor:
        out = room.take("scores", values[0].numel(), torch.float32)
        return scores(values[1].sub_(values[0]), values[0], means[at.name], out, room)

    scored = passes.tensors(pair, look)
    totals = {t.name: passes.elements([t]) for t in scored}
    ranks = {name: max(1, round(density * total)) for name, total in totals.items()}
    found = {name: -math.inf for name in ranks}
    chosen = [t for t in scored if ranks[t.name] < totals[t.name]]
    # The magnitude after clamping: without a change the score is -0, whose sign bit would count.
    above = largest_of_each(
        lambda: ((at.name, s.clamp_(min=0.0).abs_()) for at, s in passes.over(chosen)),
        {t.name: [ranks[t.name]] for t in chosen},
    )
    found |= {name: value for name, (value,) in above.items()}
    # If fewer than k are above zero, it is the (total - k + 1)-th smallest from below.
    lower = [t for t in chosen if not found[t.name] > 0]
    below = largest_of_each(
        lambda: ((at.name, s.clamp_(max=0.0).abs_()) for at, s in passes.over(lower)),
        {t.name: [totals[t.name] - ranks[t.name] + 1] for t in lower},
    )
    found |= {name: -value for name, (value,) in below.items()}
    return {name: (means[name], found[name]) for name in ranks}


def means_of(magnitudes: Sequence[OutputTensor], passes: Passes) -> dict[str, float]:
    """The mean of each tensor's values; it does not depend on chunking.

    Args:
        magnitudes: The tensors.
        passes: Runs the pass.

    Returns:
        The means by name.
    """
    sums: dict[str, list[float]] = {t.name: [] for t in magnitudes}
    for at, piece in passes.over(magnitudes):
        sums[at.name] += [float(part.sum()) for part in piece.double().split(PIECE)]
    return {t.name: math.fsum(sums[t.name]) / max(1, passes.elements([t])) for t in magnitudes}
