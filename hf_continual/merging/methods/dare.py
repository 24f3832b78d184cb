r"""DARE: drop changes at random and rescale the rest (Yu et al., ICML 2024, arXiv 2311.03099).

    m ~ Bernoulli(density) per element,    delta' = m * delta / density,    theta = theta_base + sum_i lambda_i delta'_i

Fine-tuned models change most weights by little, so that most changes can go (the paper drops 90 % and more) while their sum
keeps its expectation; what is left of several models collides less. DARE-TIES puts the drop in place of TIES's trimming.

Which elements are kept is a function of the seed, the model's place, the tensor's name and the element's index alone: the same
merge gives the same bytes whatever it is cut into.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_continual.merging.average import scales_for
from hf_continual.merging.chunks import Chunk
from hf_continual.merging.methods.base import MergeMethod, Models, Rules
from hf_continual.merging.methods.room import Room
from hf_continual.merging.methods.ties import elect_and_merge
from hf_continual.merging.passes import Passes
from hf_continual.paper import Paper

PAPER = Paper(
    "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
    "Yu et al.",
    2024,
    "2311.03099",
    "ICML 2024",
)

_PIECE = 65_536  # elements whose bits are made at a time; they stay in a core's cache
_STEPS = np.arange(_PIECE, dtype=np.uint32)
# lowbias32: a mixer of 32 bits. Two rounds, keyed before each, turn a counter into independent bits.
_MIXER = ((np.uint32(16), np.uint32(0x7FEB352D)), (np.uint32(15), np.uint32(0x846CA68B)))


def bits_at(seed: int, place: int, name: str, start: int, stop: int, room: Room | None = None) -> np.ndarray:
    """Random bits of a range of elements: a function of its arguments alone, whatever ranges they are asked for in.

    Args:
        seed: The merge's seed.
        place: Which model.
        name: The tensor.
        start: First element of the flattened tensor.
        stop: Behind the last.
        room: Memory for them, used again by the next call.

    Returns:
        uint32 of (stop - start).
    """
    key = hashlib.blake2b(f"{seed}/{place}/{name}".encode(), digest_size=16).digest()
    first, second, third = np.frombuffer(key, np.uint32)[:3]
    room = room or Room()
    found, other = (
        room.take(key, count, torch.int32).numpy().view(np.uint32)
        for key, count in (("bits", stop - start), ("shifted", _PIECE))
    )
    at = start
    while at < stop:
        # A piece begins and ends at multiples of its size, so that none crosses a multiple of 2^32.
        begin = at - at % _PIECE
        end = min(begin + _PIECE, stop)
        bits, rest = found[at - start : end - start], other[: end - at]
        np.add(_STEPS[at - begin : end - begin], np.uint32(begin & 0xFFFFFFFF), out=bits)
        bits ^= first
        with np.errstate(over="ignore"):
            for word in (second ^ np.uint32(begin >> 32), third):
                bits += word
                for shift, factor in _MIXER:
                    bits ^= np.right_shift(bits, shift, out=rest)
                    bits *= factor
                bits ^= np.right_shift(bits, np.uint32(16), out=rest)
        at = end
    return found


def kept_at(
    seed: int, place: int, name: str, start: int, stop: int, density: float, room: Room | None = None
) -> np.ndarray:
    """Which elements of a range are kept.

    Args:
        seed: The merge's seed.
        place: Which model.
        name: The tensor.
        start: First element of the flattened tensor.
        stop: Behind the last.
        density: Probability that an element is kept.
        room: Memory for the numbers in between.

    Returns:
        bool of (stop - start).
    """
    return bits_at(seed, place, name, start, stop, room) < np.uint32(min(round(density * 2**32), 2**32 - 1))


def dropped(change: Tensor, seed: int, place: int, at: Chunk, density: float, room: Room | None = None) -> Tensor:
    """A change with most of it dropped and the rest rescaled, overwritten.

    Args:
        change: What a model changed of the base, flat.
        seed: The merge's seed.
        place: Which model.
        at: Where the range is.
        density: Probability that an element is kept.
        room: Memory for the numbers in between.

    Returns:
        The change.
    """
    if density >= 1:
        return change
    # As numbers of the change's own kind: torch is several times slower where kinds meet.
    room = room or Room()
    factors = room.take("kept", change.numel(), torch.float32)
    np.copyto(factors.numpy(), kept_at(seed, place, at.name, at.start, at.stop, density, room))
    return change.mul_(factors).div_(density)


@dataclass(frozen=True)
class DropAndAdd:
    """DARE with task arithmetic, a rule on the values of the base and the tuned models.

    Args:
        density: Share of each change that is kept.
        scales: lambda of each model.
        seed: What decides which.
    """

    density: float
    scales: tuple[float, ...]
    seed: int = 0
    _room: Room = field(default_factory=Room, init=False, repr=False, compare=False)

    def __call__(self, values: Sequence[Tensor], at: Chunk) -> Tensor:
        """Add what is left of the changes, overwriting the values.

        Args:
            values: Base first, then the models.
            at: Where they are.

        Returns:
            The result, in the memory of the base.
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
        density: Share of each change that is kept.
        scale: lambda.
        seed: What decides which.
    """

    density: float
    scale: float = 1.0
    seed: int = 0
    _room: Room = field(default_factory=Room, init=False, repr=False, compare=False)

    def __call__(self, values: Sequence[Tensor], at: Chunk) -> Tensor:
        """Drop, elect and merge, overwriting the values.

        Args:
            values: Base first, then the models.
            at: Where they are.

        Returns:
            The result, in the memory of the base.
        """
        base, *others = values
        changes = [
            dropped(other.sub_(base), self.seed, place, at, self.density, self._room)
            for place, other in enumerate(others)
        ]
        return elect_and_merge(base, changes, self.scale, self._room)


def check_density(density: float) -> None:
    """Refuse what is no share."""
    if not 0 < density <= 1:
        raise ValueError(f"density={density}: it is a share, above 0 and at most 1.")


@dataclass
class Dare(MergeMethod):
    """Add what is left of several models' changes to their base.

    Args:
        density: Share of each change that is kept; the paper keeps 0.1 and less.
        scale: lambda, one for all models or one each.
        seed: Which elements are kept.

    Raises:
        ValueError: If the density is no share.
    """

    density: float = 0.1
    scale: float | Sequence[float] = 0.5
    seed: int = 0

    name: ClassVar[str] = "dare"
    paper: ClassVar[Paper] = PAPER
    from_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_density(self.density)

    def check(self, models: Models) -> None:
        """One scale, or one per model."""
        scales_for(self.scale, len(models.named))

    def prepare(self, models: Models, passes: Passes) -> Rules:
        """The same rule for every tensor."""
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
    """Merge models by TIES on changes of which most were dropped at random.

    Args:
        density: Share of each change that is kept.
        scale: lambda, applied to the merged change.
        seed: Which elements are kept.

    Raises:
        ValueError: If the density is no share.
    """

    density: float = 0.1
    scale: float = 1.0
    seed: int = 0

    name: ClassVar[str] = "dare_ties"
    paper: ClassVar[Paper] = PAPER
    from_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_density(self.density)
        scales_for(self.scale, 1)

    def prepare(self, models: Models, passes: Passes) -> Rules:
        """The same rule for every tensor."""
        rule = DropElectMerge(self.density, float(self.scale), self.seed)
        return lambda _: rule

    def describe(self, models: Models) -> dict[str, Any]:
        """Density, scale, seed."""
        return {"density": self.density, "scale": float(self.scale), "seed": self.seed}
