r"""Spherical interpolation of two models, tensor by tensor (Shoemake, SIGGRAPH 1985; for weights: Goddard's and mergekit's use).

    cos(omega) = a . b / (|a| |b|),   s_a = sin((1 - t) omega) / sin(omega),   s_b = sin(t omega) / sin(omega)
    theta = s_a a + s_b b

a and b are the whole tensors. Where they point the same way, cos(omega) > 0.9995, it is the straight line. Both norms are kept
better than by the average, which is shorter than either of two vectors that point apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_continual.merging.average import Average
from hf_continual.merging.methods.base import MergeMethod, Models, Rule, Rules
from hf_continual.merging.passes import Passes
from hf_continual.paper import Paper

STRAIGHT = 0.9995  # cosine from which on the line is straight, as in mergekit


@dataclass(frozen=True)
class Arc:
    """A point on the arc between two tensors, as a rule.

    Args:
        first: s_a.
        second: s_b.
    """

    first: float
    second: float

    def __call__(self, values: Sequence[Tensor], at: Any = None) -> Tensor:
        """The point, overwriting the values.

        Args:
            values: The two models'.
            at: Where they are; of no matter here.

        Returns:
            It, in the memory of the first.
        """
        return values[0].mul_(self.first).add_(values[1], alpha=self.second)


def arc(cosine: float, t: float) -> tuple[float, float] | None:
    """s_a and s_b, or None where the line is straight.

    Args:
        cosine: Of the angle between the tensors.
        t: Share of the way.

    Returns:
        Both factors.
    """
    if not abs(cosine) <= STRAIGHT:
        return None
    omega = math.acos(cosine)
    return math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)


@dataclass
class Slerp(MergeMethod):
    """The point at `t` of the arc from the first model to the second.

    Args:
        t: Share of the way, 0 to 1.

    Raises:
        ValueError: If it is no share.
    """

    t: float = 0.5
    _cosines: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    name: ClassVar[str] = "slerp"
    paper: ClassVar[Paper] = Paper("Animating rotation with quaternion curves", "Shoemake", 1985, venue="SIGGRAPH 1985")
    looks: ClassVar[bool] = True
    models: ClassVar[tuple[int, int | None]] = (2, 2)

    def __post_init__(self) -> None:
        if not 0 <= self.t <= 1:
            raise ValueError(f"t={self.t}: it is a share of the way, 0 for the first model and 1 for the second.")

    def prepare(self, models: Models, passes: Passes) -> Rules:
        """One pass for the angle of each tensor."""
        self._cosines = passes.once("cosines", lambda: cosines(models, passes))
        line = Average((1.0 - self.t, self.t))

        def rule_for(name: str) -> Rule:
            found = arc(self._cosines[name], self.t) if name in self._cosines else None
            return line if found is None else Arc(*found)

        return rule_for

    def facts(self) -> Mapping[str, Any]:
        """The cosine of each tensor."""
        return {"cosines": self._cosines}

    def describe(self, models: Models) -> dict[str, Any]:
        """The share of the way."""
        return {"t": float(self.t)}


def cosines(models: Models, passes: Passes) -> dict[str, float]:
    """The cosine of the angle between the two models' tensors, by name; float64 sums.

    Args:
        models: The two.
        passes: Makes the pass.

    Returns:
        Of tensors that differ; 1 where one is zero.
    """

    def products(values: Sequence[Tensor]) -> Tensor:
        a, b = values[0].double(), values[1].double()
        return torch.stack([a @ b, a @ a, b @ b])

    sums = passes.sums(models.members, products)
    return {name: cosine(*map(float, found)) for name, found in sums.items()}


def cosine(ab: float, aa: float, bb: float) -> float:
    """Of the angle between two vectors, from their products; 1 where one is zero."""
    length = math.sqrt(aa * bb)
    return 1.0 if length == 0 else max(-1.0, min(1.0, ab / length))
