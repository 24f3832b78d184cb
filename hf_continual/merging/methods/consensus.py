r"""Consensus Merging: keep what matters to several models (Wang et al., ICML 2024, arXiv 2405.07813).

    tau = sum_i tau_i                                       the multi-task vector
    m_i = |tau_i| > selectivity |tau - tau_i|               TALL-mask of model i, per element
    theta = theta_base + lambda tau  where  sum_i m_i >= agree,  theta_base elsewhere

Elements that matter to only one model are selfish, those that matter to none are catastrophic: they arise where changes add
up to what no model had. Without both kinds, task arithmetic keeps more of its tasks. The paper uses agree = 2, chooses the
selectivity of each task among 0.2 to 0.6 on validation data and tunes one lambda. The masks per task, which the paper uses to compress
models, do not give a merged model and are not made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_continual.bounds import whole_number
from hf_continual.merging.engine.passes import Passes
from hf_continual.merging.engine.room import Room
from hf_continual.merging.engine.task_vectors import scales_for
from hf_continual.merging.methods.base import MergeMethod, Models, Rules
from hf_continual.paper import Paper


@dataclass(frozen=True)
class AddConsensus:
    """The rule on the values of the base and the tuned models.

    Args:
        scale: lambda.
        selectivity: Selectivity of each model's mask.
        agree: Number of models that an element must matter to.
    """

    scale: float
    selectivity: tuple[float, ...]
    agree: int = 2
    _room: Room = field(default_factory=Room, init=False, repr=False, compare=False)

    def __call__(self, values: Sequence[Tensor], at: Any = None) -> Tensor:
        """Add what several models agree on, overwriting the values.

        Args:
            values: Base first, then the models.
            at: Their position; unused.

        Returns:
            The result, in the base's memory.
        """
        base, *others = values
        changes = [other.sub_(base) for other in others]
        total, count, left = (self._room.like(base, key) for key in ("total", "count", "left"))
        total.copy_(changes[0])
        for change in changes[1:]:
            total.add_(change)
        count.zero_()
        for change, selectivity in zip(changes, self.selectivity, strict=True):
            torch.sub(total, change, out=left).abs_().mul_(selectivity)
            count.add_(change.abs_().gt_(left))
        return base.add_(total.mul_(count.ge_(self.agree)), alpha=self.scale)


@dataclass
class Consensus(MergeMethod):
    """Apply task arithmetic to the elements that matter to several models.

    Args:
        scale: lambda, applied to the sum of the changes.
        selectivity: How much larger a model's change must be than the sum of the others', one value or one per model; larger
            values keep fewer elements.
        agree: Number of models that an element must matter to; 1 drops only elements that matter to none.

    Raises:
        ValueError: If a number is out of range.
    """

    scale: float = 0.3
    selectivity: float | Sequence[float] = 0.4
    agree: int = 2

    name: ClassVar[str] = "consensus"
    paper: ClassVar[Paper] = Paper(
        "Localizing Task Information for Improved Model Merging and Compression",
        "Wang et al.",
        2024,
        "2405.07813",
        "ICML 2024",
    )
    from_base: ClassVar[bool] = True
    models: ClassVar[tuple[int, int | None]] = (2, None)

    def __post_init__(self) -> None:
        scales_for(self.scale, 1)
        whole_number(self.name, "agree", self.agree, unit="models")

    def check(self, models: Models) -> None:
        """Check that there is one selectivity per model, and no more models that must agree than models."""
        number = len(models.named)
        if min(found := self._selectivity(number)) <= 0:
            raise ValueError(f"selectivity={list(found)}: it must be above 0, and the paper uses 0.2 to 0.6.")
        if self.agree > number:
            raise ValueError(f"agree={self.agree} of {number} models: nothing would be kept. Give at most {number}.")

    def _selectivity(self, number: int) -> tuple[float, ...]:
        return scales_for(self.selectivity, number, "selectivity")

    def prepare(self, models: Models, passes: Passes) -> Rules:
        """Return the same rule for every tensor."""
        rule = AddConsensus(float(self.scale), self._selectivity(len(models.named)), self.agree)
        return lambda _: rule

    def describe(self, models: Models) -> dict[str, Any]:
        """Scale, one selectivity per model, how many must agree."""
        return {
            "scale": float(self.scale),
            "selectivity": list(self._selectivity(len(models.named))),
            "agree": self.agree,
        }
