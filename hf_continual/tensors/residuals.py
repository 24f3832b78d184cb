"""Exact weights in low precision: a weight in bf16 or fp16 and, in fp32, the residual: what rounding took from it.

An optimizer that keeps residuals trains the fp32 weights, rounded. Other code that edits such a weight in place leaves
it with the residual of its old value. An edit therefore drops the residual, unless the editor reads and writes both,
like `hf_continual.tensors.flat.Flat` does: it writes the exact weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@runtime_checkable
class KeepsResiduals(Protocol):
    """An optimizer that keeps the rounding errors of weights."""

    def residual(self, p: Tensor) -> Tensor | None:
        """The rounding error of a weight, this process's shard, fp32; zeros once other code has edited the weight.

        An edit is seen if it goes through the tensor, under ``torch.no_grad()``; ``p.data`` hides it.

        Args:
            p: A parameter.

        Returns:
            The residual itself, to be changed in place before `settle`; None where the weight is exact.
        """

    def settle(self, p: Tensor) -> None:
        """Declare that a weight and its residual, as they are now, belong together.

        Args:
            p: A parameter.
        """


def stamp(p: Tensor) -> tuple[int, int, int]:
    """A mark of a weight that changes with every edit in place, and when other memory replaces it."""
    held = p._local_tensor if isinstance(p, DTensor) else p
    return p._version, held._version, held.data_ptr()


def to_exact_(weights: Sequence[Tensor], residuals: list[Tensor]) -> list[Tensor]:
    """Turn residuals into the exact weights, in the residuals' memory.

    Args:
        weights: In low precision.
        residuals: fp32, of the same shapes.

    Returns:
        The tensors of `residuals`.
    """
    for residual, weight in zip(residuals, weights, strict=True):
        residual.add_(weight)
    return residuals


def round_(weights: list[Tensor], exact: list[Tensor]) -> None:
    """Write exact weights into weights, and the rounding errors into the memory of the exact ones.

    Args:
        weights: In low precision.
        exact: fp32, of the same shapes; hold the residuals afterwards.
    """
    torch._foreach_copy_(weights, exact)
    for residual, weight in zip(exact, weights, strict=True):
        residual.sub_(weight)
