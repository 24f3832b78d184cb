r"""The directions of a matrix with the largest singular values: find them, project onto their complement, put them back.

With U (O, R), s and V (I, R) of the R largest singular values of a weight W (O, I), a change D leaves them alone if

    U^T D = 0  and  D V = 0,        which (1 - U U^T) D (1 - V V^T) is for any D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

AddUp = Callable[[Tensor], Tensor]


@dataclass
class Subspace:
    """The R largest singular values of a matrix and their directions, float32.

    Args:
        U_OR: Left directions, orthonormal columns; on several processes, the rows of this process's shard.
        s_R: Singular values, largest first.
        V_IR: Right directions, orthonormal columns.
        add_up: Sums over processes that hold different rows, else None.
    """

    U_OR: Tensor
    s_R: Tensor
    V_IR: Tensor
    add_up: AddUp | None = None

    def left(self, matrix_OX: Tensor) -> Tensor:
        """U^T M, (R, X), over all processes."""
        found = self.U_OR.mT @ matrix_OX
        return found if self.add_up is None else self.add_up(found)


@torch.no_grad()
def top_subspace(weight_OI: Tensor, rank: int) -> Subspace:
    """Decompose a matrix.

    Args:
        weight_OI: The matrix, of any float dtype.
        rank: R, at most the smaller side.

    Returns:
        Its R largest singular values and their directions.
    """
    # In float32 the decomposition itself would be off by 1e-6 of the largest singular value.
    U, s, Vh = torch.linalg.svd(weight_OI.double(), full_matrices=False)
    return Subspace(U[:, :rank].float().contiguous(), s[:rank].float(), Vh[:rank].mT.float().contiguous())


@torch.no_grad()
def remove_left_(matrix_OX: Tensor, space: Subspace) -> None:
    """M <- (1 - U U^T) M, in place, for a matrix with the weight's rows such as LoRA's B."""
    exact = matrix_OX.float()
    matrix_OX.copy_(exact - space.U_OR @ space.left(exact))


@torch.no_grad()
def remove_right_(matrix_XI: Tensor, space: Subspace) -> None:
    """M <- M (1 - V V^T), in place, for a matrix with the weight's columns such as LoRA's A."""
    exact = matrix_XI.float()
    matrix_XI.copy_(exact - (exact @ space.V_IR) @ space.V_IR.mT)


@torch.no_grad()
def put_back_(weight_OI: Tensor, space: Subspace) -> None:
    """Give the preserved directions of a weight their original values, in place; the rest stays as it is.

    U^T W = s V^T and W V = U s held at the start, so that neither a copy of the weight nor of the step is needed, and rounding
    errors do not add up from step to step.
    """
    exact = weight_OI.float()
    exact = exact - space.U_OR @ (space.left(exact) - space.s_R[:, None] * space.V_IR.mT)
    exact -= (exact @ space.V_IR - space.U_OR * space.s_R) @ space.V_IR.mT
    weight_OI.copy_(exact)


@torch.no_grad()
def moved(weight_OI: Tensor, space: Subspace) -> Tensor:
    """How far the preserved part U^T W of a weight is from its original s V^T, relative to it; a scalar."""
    now_RI = space.left(weight_OI.float())
    return torch.linalg.vector_norm(now_RI - space.s_R[:, None] * space.V_IR.mT) / torch.linalg.vector_norm(space.s_R)


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 matrices in float32: TF32, which bf16 training switches on, would err by 1e-3 of the weight."""
    backends: Any = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # pyrefly: ignore[missing-attribute]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
