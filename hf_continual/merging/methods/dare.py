r"""DARE: drop changes at random and rescale the rest (Yu et al., ICML 2024, arXiv 2311.03099).

    m ~ Bernoulli(density) per element,    delta' = m * delta / density,    theta = theta_base + sum_i lambda_i delta'_i

Fine-tuning changes most weights only a little, so most changes can be dropped (the paper drops 90 % and more) while their sum
keeps its expectation; the remaining changes of several models collide less. DARE-TIES replaces TIES's trimming by this drop.

Which elements are kept is a function of the seed, the model's place, the tensor's name and the element's index alone: the same
merge gives the same bytes, however it is split into chunks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from hf_continual.bounds import whole_number
from hf_continual.merging.engine.chunks import Chunk
from hf_continual.merging.engine.dropping import dropped
from hf_continual.merging.engine.passes import Passes
from hf_continual.merging.engine.room import Room
from hf_continual.merging.engine.task_vectors import check_density, elect_and_merge, scales_for
from hf_continual.merging.methods.base import MergeMethod, Models, Rules
from hf_continual.merging.pipeline import merge_by
from hf_continual.paper import Paper

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hf_continual.merging.engine.options import OutputOptions
    from hf_continual.merging.engine.result import MergeResult


PAPER = Paper(
    "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
    "Yu et al.",
    2024,
    "2311.03099",
    "ICML 2024",
)


@dataclass(frozen=True)
class DropAndAdd:
    """DARE with task arithmetic, a rule on the values of the base and the tuned models.

    Args:
        density: Fraction of each change that is kept.
        scales: lambda of each model.
        seed: Determines which elements are kept.
    """

    density: float
    scales: tuple[float, ...]
    seed: int = 0
    _room: Room = field(default_factory=Room, init=False, repr=False, compare=False)

    def __call__(self, values: Sequence[Tensor], at: Chunk) -> Tensor:
        """Add the remaining changes, overwriting the values.

        Args:
            values: Base first, then the models.
            at: Their position.

        Returns:
            The result, in the base's memory.
        """
        base, *others = values
        changes = [other.sub_(base) for other in others]
        for place, (change, scale) in enumerate(zip(changes, self.scales, strict=True)):
            base.add_(dropped(change, self.seed, place, at, self.density, self._room), alpha=scale)
        return base


@dataclass(frozen=True)
class DropElectMerge:
    """DARE in place of TIES's trimming, a rule on the values of the base and the tuned models.

    Args:
        density: Fraction of each change that is kept.
        scale: lambda.
        seed: Determines which elements are kept.
    """

    density: float
    scale: float = 1.0
    seed: int = 0
    _room: Room = field(default_factory=Room, init=False, repr=False, compare=False)

    def __call__(self, values: Sequence[Tensor], at: Chunk) -> Tensor:
        """Drop, elect and merge, overwriting the values.

        Args:
            values: Base first, then the models.
            at: Their position.

        Returns:
            The result, in the base's memory.
        """
        base, *others = values
        changes = [
            dropped(other.sub_(base), self.seed, place, at, self.density, self._room)
            for place, other in enumerate(others)
        ]
        return elect_and_merge(base, changes, self.scale, self._room)


@dataclass
class Dare(MergeMethod):
    """Drop changes at random, rescale the rest, and add them to the base.

    Args:
        density: Fraction of each change that is kept; the paper keeps 0.1 and less.
        scale: lambda, one value for all models or one per model.
        seed: Seed that determines which elements are kept.

    Raises:
        ValueError: If the density is not a fraction.
    """

    density: float = 0.1
    scale: float | Sequence[float] = 0.5
    seed: int = 0

    name: ClassVar[str] = "dare"
    paper: ClassVar[Paper] = PAPER
    from_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_density(self.name, self.density)
        whole_number(self.name, "seed", self.seed, least=0)

    def check(self, models: Models) -> None:
        """Check that there is one scale, or one per model."""
        scales_for(self.scale, len(models.named))

    def prepare(self, models: Models, passes: Passes) -> Rules:
        """Return the same rule for every tensor."""
        rule = DropAndAdd(self.density, scales_for(self.scale, len(models.named)), self.seed)
        return lambda _: rule

    def describe(self, models: Models) -> dict[str, Any]:
        """Density, one scale per model, seed."""
        return {
            "density": self.density,
            "scale": list(scales_for(self.scale, len(models.named))),
            "seed": self.seed,
        }


@dataclass
class DareTies(MergeMethod):
    """Merge models by TIES, with most changes dropped at random instead of trimmed.

    Args:
        density: Fraction of each change that is kept.
        scale: lambda, applied to the merged change.
        seed: Seed that determines which elements are kept.

    Raises:
        ValueError: If the density is not a fraction.
    """

    density: float = 0.1
    scale: float = 1.0
    seed: int = 0

    name: ClassVar[str] = "dare_ties"
    paper: ClassVar[Paper] = PAPER
    from_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_density(self.name, self.density)
        whole_number(self.name, "seed", self.seed, least=0)
        scales_for(self.scale, 1)

    def prepare(self, models: Models, passes: Passes) -> Rules:
        """Return the same rule for every tensor."""
        rule = DropElectMerge(self.density, float(self.scale), self.seed)
        return lambda _: rule

    def describe(self, models: Models) -> dict[str, Any]:
        """Density, scale, seed."""
        return {"density": self.density, "scale": float(self.scale), "seed": self.seed}


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
    """Drop most of each model's changes at random, rescale the rest, and add them to the base.

    Example:
        >>> dare(["law", "tax"], "both", base="Qwen/Qwen2.5-0.5B", density=0.1)

    Args:
        models: Full models and LoRA adapters in any mix: folders or Hub ids (``"id@revision"``).
        output_dir: Output folder; complete or absent.
        base: The full model that they were fine-tuned from.
        density: Fraction of each change that is kept.
        scale: lambda, one value for all models or one per model.
        seed: Seed that determines which elements are kept; the bytes do not depend on chunking.
        **output: How it is written, see `OutputOptions`. The result is not low-rank, so it is a full model.

    Returns:
        The output folder, and the report of what it was made from.

    Raises:
        ValueError: If an argument does not fit.
        MergeError: If the models do not fit.
    """
    return merge_by(Dare(density, scale, seed), models, output_dir, base=base, **output)


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
    """Merge models by TIES, with most changes dropped at random (DARE) instead of trimmed.

    Args:
        models: Full models and LoRA adapters in any mix: folders or Hub ids (``"id@revision"``).
        output_dir: Output folder; complete or absent.
        base: The full model that they were fine-tuned from.
        density: Fraction of each change that is kept.
        scale: lambda, applied to the merged change.
        seed: Seed that determines which elements are kept; the bytes do not depend on chunking.
        **output: How it is written, see `OutputOptions`. The result is not low-rank, so it is a full model.

    Returns:
        The output folder, and the report of what it was made from.

    Raises:
        ValueError: If an argument does not fit.
        MergeError: If the models do not fit.
    """
    return merge_by(DareTies(density, scale, seed), models, output_dir, base=base, **output)
