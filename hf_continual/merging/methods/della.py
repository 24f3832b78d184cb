r"""DELLA: drop small changes more often than large ones, then elect and average (Deep et al. 2024, arXiv 2406.11617).

    MAGPRUNE  in each row of a change, rank r = 0 for the smallest magnitude to n - 1 for the largest;
              kept with probability q_r = density - epsilon / 2 + epsilon r / (n - 1), and then divided by q_r
    elect     gamma = sign(sum_i delta'_i), per element
    fuse      tau = mean of those delta'_i that are not 0 and have the sign gamma;    theta = theta_base + lambda tau

With epsilon = 0 it is DARE-TIES. The paper names the probability to drop, p = 1 - q; epsilon is the width of all
probabilities (its authors' code calls it the window, mergekit's epsilon is half of it). A row is the last dimension; a vector
is one row. Among equal magnitudes, which are common in bfloat16 models, the later element has the higher rank.

Which elements are kept is a function of the seed, the model's place, the tensor's name and the element's index and rank, as in DARE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_continual.bounds import number, whole_number
from hf_continual.merging.engine.chunks import Chunk
from hf_continual.merging.engine.dropping import bits_at
from hf_continual.merging.engine.passes import Passes
from hf_continual.merging.engine.room import Room
from hf_continual.merging.engine.task_vectors import elect_and_merge, scales_for
from hf_continual.merging.methods.base import MergeMethod, Models, Rules
from hf_continual.paper import Paper


def in_order(change: Tensor, columns: int, room: Room) -> np.ndarray:
    """Sort the elements of each row by magnitude, the smallest first.

    Args:
        change: Whole rows, flat.
        columns: Elements of a row.
        room: Scratch memory.

    Returns:
        int64 of (rows, columns): places in the flat change.
    """
    # The bits of a magnitude sort like the magnitude. With the column below them every key is unique, so any sort gives the
    # same order, and the column can be read off the sorted keys: several times faster than sorting indices.
    sizes = torch.abs(change.float(), out=room.take("sizes", change.numel(), torch.float32))
    keys = room.take("keys", change.numel(), torch.int64).numpy().view(np.uint64).reshape(-1, columns)
    np.copyto(keys, sizes.view(torch.int32).numpy().view(np.uint32).reshape(-1, columns))
    keys <<= np.uint64(32)
    keys |= np.arange(columns, dtype=np.uint64)
    keys.sort(axis=1)
    keys &= np.uint64(0xFFFFFFFF)
    keys += (np.arange(len(keys), dtype=np.uint64) * np.uint64(columns))[:, None]
    return keys.view(np.int64)


def chances(columns: int, density: float, epsilon: float) -> np.ndarray:
    """q_r: the probability to keep the element of each rank.

    Args:
        columns: Elements of a row.
        density: Mean of the probabilities.
        epsilon: Their width.

    Returns:
        float64 of (columns), rising.
    """
    place = np.arange(columns) / (columns - 1) if columns > 1 else np.full(columns, 0.5)
    return density + epsilon * (place - 0.5)


def pruned(
    change: Tensor, density: float, epsilon: float, seed: int, place: int, at: Chunk, room: Room | None = None
) -> Tensor:
    """MAGPRUNE: drop most of a change and rescale the rest, in place.

    Args:
        change: A model's change from the base, in whole rows, flat.
        density: Mean probability that an element is kept.
        epsilon: Width of the probabilities.
        seed: The merge's seed.
        place: Index of the model.
        at: Position of the range.
        room: Scratch memory.

    Returns:
        The change.
    """
    columns = at.shape[-1] if at.shape else 1
    chance = chances(columns, density, epsilon)
    limits = np.minimum(np.rint(chance * 2**32), 2**32 - 1).astype(np.uint32)
    room = room or Room()
    order = in_order(change, columns, room)
    kept = bits_at(seed, place, at.name, at.start, at.stop, room)[order] < limits
    factors = room.take("factors", change.numel(), torch.float32)
    factors.numpy()[order] = kept * (1 / chance).astype(np.float32)
    return change.mul_(factors)


@dataclass(frozen=True)
class PruneElectFuse:
    """The rule on the values of the base and the tuned models.

    Args:
        density: Mean fraction of each change that is kept.
        epsilon: Width of the probabilities.
        scale: lambda.
        seed: Determines which elements are kept.
    """

    density: float
    epsilon: float
    scale: float = 1.0
    seed: int = 0
    _room: Room = field(default_factory=Room, init=False, repr=False, compare=False)

    whole_rows: ClassVar[bool] = True

    def __call__(self, values: Sequence[Tensor], at: Chunk) -> Tensor:
        """Prune, elect and fuse, overwriting the values.

        Args:
            values: Base first, then the models.
            at: Their position.

        Returns:
            The result, in the base's memory.
        """
        base, *others = values
        changes = [other.sub_(base) for other in others]
        for place, change in enumerate(changes):
            pruned(change, self.density, self.epsilon, self.seed, place, at, self._room)
        return elect_and_merge(base, changes, self.scale, self._room)


@dataclass
class Della(MergeMethod):
    """Merge models by TIES, with smaller changes dropped more often instead of trimming.

    Args:
        density: Mean fraction of each change that is kept.
        epsilon: Width of the probabilities: the smallest change of a row is kept with ``density - epsilon / 2``, the largest
            with ``density + epsilon / 2``.
        scale: lambda, applied to the merged change.
        seed: Seed that determines which elements are kept.

    Raises:
        ValueError: If a probability is out of range.
    """

    density: float = 0.3
    epsilon: float = 0.14
    scale: float = 1.0
    seed: int = 0

    name: ClassVar[str] = "della"
    paper: ClassVar[Paper] = Paper(
        "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
        "Deep et al.",
        2024,
        "2406.11617",
    )
    from_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number(self.name, "density", self.density)
        number(self.name, "epsilon", self.epsilon)
        whole_number(self.name, "seed", self.seed, least=0)
        least, most = self.density - self.epsilon / 2, self.density + self.epsilon / 2
        if not (self.epsilon >= 0 and 0 < least and most <= 1):
            raise ValueError(
                f"density={self.density} and epsilon={self.epsilon}: elements would be kept with probabilities from {least} to "
                f"{most}; they must be above 0 and at most 1. Give a smaller epsilon."
            )
        scales_for(self.scale, 1)

    def prepare(self, models: Models, passes: Passes) -> Rules:
        """Return the same rule for every tensor; it sees whole rows."""
        rule = PruneElectFuse(self.density, self.epsilon, float(self.scale), self.seed)
        return lambda _: rule

    def describe(self, models: Models) -> dict[str, Any]:
        """Density, epsilon, scale, seed."""
        return {"density": self.density, "epsilon": self.epsilon, "scale": float(self.scale), "seed": self.seed}
