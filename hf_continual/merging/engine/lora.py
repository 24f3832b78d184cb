"""LoRA algebra, exact: sums of products stay products. Factors are never averaged, which would add cross terms.

sum_i w_i s_i B_i A_i = [B_1, B_2, ...] [w_1 s_1 A_1; w_2 s_2 A_2; ...]        rank sum r_i, exact
best rank r:  B = Q_B R_B,  A^T = Q_A R_A,  SVD of the small R_B R_A^T, first r parts      (Eckart-Young)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def concatenated(weights: Sequence[float], a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The weighted sum of products as one product.

    Args:
        weights: w_i s_i of each.
        a: Factors A, ``(r_i, in)``.
        b: Factors B, ``(out, r_i)``.

    Returns:
        A ``(sum r_i, in)`` and B ``(out, sum r_i)``; the weights are in A.
    """
    return torch.cat([w * x for w, x in zip(weights, a, strict=True)], 0), torch.cat(list(b), 1)


def truncated(a_RI: Tensor, b_OR: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The nearest product of a smaller rank, without forming the ``(out, in)`` matrix.

    Args:
        a_RI: Factor A, ``(R, in)``.
        b_OR: Factor B, ``(out, R)``.
        rank: The rank wanted.

    Returns:
        A and B of that rank (or less, where the product has less) in float64, and the relative Frobenius error of their product.
    """
    q_b, r_b = torch.linalg.qr(b_OR.double())
    q_a, r_a = torch.linalg.qr(a_RI.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T)
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    total = float(torch.linalg.vector_norm(s))
    error = float(torch.linalg.vector_norm(s[rank:])) / total if total > 0 else 0.0
    return root[:, None] * (v[:rank] @ q_a.T), (q_b @ u[:, :rank]) * root, error
