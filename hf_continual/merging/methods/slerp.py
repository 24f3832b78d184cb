r"""Spherical interpolation of two models, tensor by tensor (Shoemake, SIGGRAPH 1985; for weights: Goddard's and mergekit's use).

    cos(omega) = a . b / (|a| |b|),   s_a = sin((1 - t) omega) / sin(omega),   s_b = sin(t omega) / sin(omega)
    theta = s_a a + s_b b

a and b are the whole tensors. If they point the same way, cos(omega) > 0.9995, the straight line is used. Norms are kept
better than by the average, which is shorter than either of two diverging vectors.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hf_continual.bounds import between
from hf_continual.merging.engine.average import Average
from hf_continual.merging.engine.passes import Passes
from hf_continual.merging.engine.task_vectors import cosine
from hf_continual.merging.methods.base import MergeMethod, Models, Rule, Rules
from hf_continual.merging.pipeline import merge_by
from hf_continual.paper import Paper

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hf_continual.merging.engine.options import OutputOptions
    from hf_continual.merging.engine.result import MergeResult


STRAIGHT = 0.9995  # cosine above which the line is straight, as in mergekit


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
        """Compute the point, overwriting the values.

        Args:
            values: The two models' values.
            at: Their position; unused.

        Returns:
            The point, in the first tensor's memory.
        """
        return values[0].mul_(self.first).add_(values[1], alpha=self.second)


def arc(cosine: float, t: float) -> tuple[float, float] | None:
    """Compute s_a and s_b, or None where the line is straight.

    Args:
        cosine: Cosine of the angle between the tensors.
        t: Fraction of the way.

    Returns:
        Both factors.
    """
    if not abs(cosine) <= STRAIGHT:
        return None
    omega = math.acos(cosine)
    return math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)


@dataclass
class Slerp(MergeMethod):
    """Take the point at `t` of the arc from the first model to the second.

    Args:
        t: Fraction of the way, 0 to 1.

    Raises:
        ValueError: If it is not a fraction.
    """

    t: float = 0.5
    _cosines: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    name: ClassVar[str] = "slerp"
    paper: ClassVar[Paper] = Paper("Animating rotation with quaternion curves", "Shoemake", 1985, venue="SIGGRAPH 1985")
    looks: ClassVar[bool] = True
    models: ClassVar[tuple[int, int | None]] = (2, 2)

    def __post_init__(self) -> None:
        between(self.name, "t", self.t, 0, 1, "[]", "It is a fraction of the way: 0 is the first model, 1 the second.")

    def prepare(self, models: Models, passes: Passes) -> Rules:
        """Make one pass for the angle of each tensor."""
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
        """The fraction of the way."""
        return {"t": float(self.t)}


def cosines(models: Models, passes: Passes) -> dict[str, float]:
    """Compute the cosine of the angle between the two models' tensors, by name, with float64 sums.

    Args:
        models: The two.
        passes: Runs the pass.

    Returns:
        The cosines, for tensors that differ; 1 if one is zero.
    """

    def products(values: Sequence[Tensor]) -> Tensor:
        a, b = values[0].double(), values[1].double()
        return torch.stack([a @ b, a @ a, b @ b])

    sums = passes.sums(models.members, products)
    return {name: cosine(*map(float, found)) for name, found in sums.items()}


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
        output_dir: Output folder; complete or absent.
        t: Fraction of the way from the first to the second.
        base: The full model that adapters belong to. It is not part of the merge.
        **output: How it is written, see `OutputOptions`. The result is not low-rank, so it is a full model.

    Returns:
        The output folder, and the report of what it was made from; the report holds the angles.

    Raises:
        ValueError: If an argument does not fit.
        MergeError: If the models do not fit.
    """
    return merge_by(Slerp(t), [first, second], output_dir, base=base, **output)
