"""How alike the hidden states of two models are, layer by layer: linear CKA without the bias of few samples."""

from __future__ import annotations

import numpy as np


def linear_cka(one_KD: np.ndarray, two_KE: np.ndarray) -> float | None:
    """Centered kernel alignment with linear kernels (Kornblith et al. 2019, arXiv 1905.00414), debiased.

    With few samples the plain estimate is near 1 for anything; this one uses the unbiased estimate of HSIC (Song et al. 2012,
    eq. 5), so that unrelated states give about 0, and may fall slightly below.

    Args:
        one_KD: States of K samples.
        two_KE: Those of another model for the same samples.

    Returns:
        1 for states that are the same up to rotation and scale; None where they do not vary, or there are fewer than 4 samples.
    """
    if len(one_KD) < 4:
        return None
    one, two = (_kernel(np.asarray(x, np.float64)) for x in (one_KD, two_KE))
    own = _hsic(one, one) * _hsic(two, two)
    return float(_hsic(one, two) / np.sqrt(own)) if own > 0 else None


def _kernel(states_KD: np.ndarray) -> np.ndarray:
    centred = states_KD - states_KD.mean(0)
    kernel = centred @ centred.T
    np.fill_diagonal(kernel, 0.0)
    return kernel


def _hsic(a_KK: np.ndarray, b_KK: np.ndarray) -> float:
    """Unbiased HSIC of kernels with zero diagonals."""
    k = len(a_KK)
    a, b = a_KK.sum(0), b_KK.sum(0)
    total = np.sum(a_KK * b_KK) + a.sum() * b.sum() / (k - 1) / (k - 2) - 2 * (a @ b) / (k - 2)
    return float(total / (k * (k - 3)))


def shifts(before_GKD: np.ndarray, after_GKD: np.ndarray) -> list[dict[str, float | None]]:
    """Likeness and relative movement of the states of every group of layers.

    Args:
        before_GKD: Token means per group (before the first block, after each, after the final norm) and row.
        after_GKD: The same of the other model.

    Returns:
        Per group ``cka`` and ``moved``, the distance of the states relative to their own norm.
    """
    found: list[dict[str, float | None]] = []
    for one, two in zip(before_GKD, after_GKD, strict=True):
        size = float(np.linalg.norm(one))
        found.append({"cka": linear_cka(one, two), "moved": float(np.linalg.norm(two - one)) / size if size else None})
    return found
