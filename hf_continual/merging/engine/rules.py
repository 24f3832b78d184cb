"""The protocol of a rule: how one range of elements of all models is merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from hf_continual.merging.engine.chunks import Chunk


class Rule(Protocol):
    """How one range of elements is merged.

    A rule that is a weighted sum has an attribute ``weights``, one number per model, summing to one: its result can then be an
    adapter, exactly, and it can merge models of different vocabularies. A rule that compares the elements of a row
    sets ``whole_rows = True``: its ranges are then whole rows, along the tensor's last dimension.
    """

    def __call__(self, values: Sequence[Tensor], at: Chunk) -> Tensor:
        """Merge a range.

        Args:
            values: The range in each model, flat, fp32 (float64 where one model is float64); they may be overwritten.
            at: Position of the range: tensor, shape, first and last element. Its values are the same tensors.

        Returns:
            The merged range.
        """
        ...


Rules = Callable[[str], Rule]


def row_of(rule: Any, shape: Sequence[int]) -> int:
    """Elements that a rule must see together: those of a row, or 1."""
    return max(1, shape[-1]) if getattr(rule, "whole_rows", False) and shape else 1


def weights_of(rule: Any) -> tuple[float, ...] | None:
    """The weights of a rule that is a weighted sum, or None."""
    return getattr(rule, "weights", None)
