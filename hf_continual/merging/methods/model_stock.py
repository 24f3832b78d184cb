r"""Model Stock: how far from the base the average of fine-tuned models should be (Jang et al., ECCV 2024, arXiv 2403.19522).

    delta_i = theta_i - theta_base,   cos = mean over pairs of cos(delta_i, delta_j)
    t = N cos / (1 + (N - 1) cos),    theta = t mean_i(theta_i) + (1 - t) theta_base          per tensor

Fine-tuned weights lie on a shell around a centre that performs better than they do. The less two of them agree, the nearer the
centre is to the base. The paper uses two models, and one angle for all weights of a layer; here each tensor has its own angle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_continual.merging.engine.average import Average
from hf_continual.merging.engine.passes import Passes
from hf_continual.merging.engine.task_vectors import cosine
from hf_continual.merging.methods.base import MergeMethod, Models, Rule, Rules
from hf_continual.paper import Paper


def share(cosines: Sequence[float], number: int) -> float:
    """Compute t, the fraction of the average, from the cosines of all pairs.

    Args:
        cosines: Cosine of each pair of changes.
        number: How many models there are.

    Returns:
        0 for the base, 1 for the average; the base if changes point away from each other.
    """
    mean = max(sum(cosines) / len(cosines), 0.0)
    return number * mean / (1 + (number - 1) * mean)


@dataclass
class ModelStock(MergeMethod):
    """Average models, moved towards their base according to the angles between their changes."""

    _shares: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    name: ClassVar[str] = "model_stock"
    paper: ClassVar[Paper] = Paper(
        "Model Stock: All we need is just a few fine-tuned models",
        "Jang et al.",
        2024,
        "2403.19522",
        "ECCV 2024",
    )
    from_base: ClassVar[bool] = True
    looks: ClassVar[bool] = True
    models: ClassVar[tuple[int, int | None]] = (2, None)
    linear: ClassVar[bool] = True

    def prepare(self, models: Models, passes: Passes) -> Rules:
        """Make one pass for the angles of each tensor."""
        number = len(models.named)
        self._shares = passes.once("shares", lambda: shares(models, passes))

        def rule_for(name: str) -> Rule:
            t = self._shares.get(name, 1.0)
            return Average((1.0 - t, *((t / number,) * number)))

        return rule_for

    def facts(self) -> Mapping[str, Any]:
        """The fraction of the average in each tensor."""
        return {"shares": self._shares}

    def describe(self, models: Models) -> dict[str, Any]:
        """It has no hyper-parameters."""
        return {}


def shares(models: Models, passes: Passes) -> dict[str, float]:
    """Compute t of each tensor that differs, by name, with float64 sums.

    Args:
        models: Base and models.
        passes: Runs the pass.

    Returns:
        The fractions.
    """
    number = len(models.named)

    def products(values: Sequence[Tensor]) -> Tensor:
        base, *others = values
        changes = torch.stack([other.double() - base for other in others])
        return changes @ changes.T

    sums = passes.sums(models.members, products)
    return {
        name: share([cosine(float(g[i, j]), float(g[i, i]), float(g[j, j])) for i, j in pairs(number)], number)
        for name, g in sums.items()
    }


def pairs(number: int) -> list[tuple[int, int]]:
    """All pairs of models."""
    return list(combinations(range(number), 2))
