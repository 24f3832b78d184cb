"""The k-th largest magnitude of a stream, exactly, in two passes and half a megabyte.

The bits of a non-negative fp32 number order as the number does. The first pass counts the upper 16 bits of every
magnitude, which names the bin that holds the k-th; the second counts the lower 16 bits of those in that bin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_BINS = 1 << 16


def kth_largest(passes: Callable[[], Iterable[Tensor]], kth: int) -> float:
    """The k-th largest of non-negative numbers that pass by twice.

    Args:
        passes: Starts a pass over all numbers in any pieces, fp32, none negative or nan. Called twice.
        kth: 1 is the largest.

    Returns:
        The number. If there are fewer than `kth`, the smallest.

    Raises:
        ValueError: If `kth` is less than 1.
    """
    if kth < 1:
        raise ValueError(f"kth={kth}: 1 is the largest.")
    upper = _count(((_bits(piece) >> 16) for piece in passes()), kth)
    lower = _count(((b & 0xFFFF)[(b >> 16) == upper[0]] for b in map(_bits, passes())), upper[1])
    return float(torch.tensor([(upper[0] << 16) | lower[0]], dtype=torch.int32).view(torch.float32))


def drop_below(values: Tensor, threshold: float, out: Tensor) -> Tensor:
    """Numbers whose magnitude reaches a threshold; 0 in place of the others.

    Args:
        values: The numbers.
        threshold: The smallest magnitude that is kept; 0 keeps all.
        out: Where they go; the numbers themselves are overwritten.

    Returns:
        The numbers that are kept.
    """
    if threshold <= 0:
        return out.copy_(values)
    # hardshrink keeps what is larger than its limit, without a mask; the limit is the next number below.
    limit = torch.nextafter(torch.tensor(threshold, dtype=values.dtype), torch.zeros((), dtype=values.dtype))
    return torch.ops.aten.hardshrink.out(values, float(limit), out=out)


def _bits(magnitudes: Tensor) -> Tensor:
    return magnitudes.float().contiguous().view(torch.int32)


def _count(pieces: Iterable[Tensor], kth: int) -> tuple[int, int]:
    """The bin that holds the k-th from above, and the rank within that bin."""
    counts = torch.zeros(_BINS, dtype=torch.int64)
    for piece in pieces:
        if piece.numel():
            counts += torch.bincount(piece, minlength=_BINS)
    above = counts.flip(0).cumsum(0)
    kth = min(kth, int(above[-1]))
    place = int(torch.searchsorted(above, torch.tensor(kth)))
    return _BINS - 1 - place, kth - (int(above[place - 1]) if place else 0)
