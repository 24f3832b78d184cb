"""The k-th largest magnitude of a stream, exactly, in two passes and half a megabyte.

The bits of a non-negative fp32 number order as the number does. The first pass counts the upper 16 bits of every
magnitude, which names the bin that holds the k-th; the second counts the lower 16 bits of those in that bin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

_BINS = 1 << 16


def kth_largest(passes: Callable[[], Iterable[Tensor]], kth: int) -> float:
    """Find the k-th largest of non-negative numbers, in two passes.

    Args:
        passes: Starts a pass over all numbers in any pieces, fp32, none negative or nan. Called twice.
        kth: 1 is the largest.

    Returns:
        The number. If there are fewer than `kth`, the smallest.

    Raises:
        ValueError: If `kth` is less than 1.
    """
    return largest(passes, [kth])[0]


def largest(passes: Callable[[], Iterable[Tensor]], kths: Sequence[int]) -> list[float]:
    """Like `kth_largest`, for several ranks in the same two passes.

    Args:
        passes: Starts a pass over all numbers.
        kths: The ranks; 1 is the largest.

    Returns:
        The numbers.

    Raises:
        ValueError: If a rank is less than 1.
    """
    return largest_of_each(lambda: (("", piece) for piece in passes()), {"": kths})[""]


def largest_of_each(
    passes: Callable[[], Iterable[tuple[str, Tensor]]], kths: Mapping[str, Sequence[int]]
) -> dict[str, list[float]]:
    """Like `largest`, for the numbers of every name in the same two passes.

    Args:
        passes: Starts a pass over the pieces of all names, with the pieces of one name in sequence.
        kths: The ranks by name.

    Returns:
        The numbers by name.

    Raises:
        ValueError: If a rank is less than 1.
    """
    if (kth := min((k for ranks in kths.values() for k in ranks), default=1)) < 1:
        raise ValueError(f"kth={kth}: 1 is the largest.")
    room = torch.empty(0, dtype=torch.int32)
    places: dict[str, list[tuple[int, int]]] = {}
    for name, pieces in groupby(passes(), itemgetter(0)):
        counts = torch.zeros(_BINS, dtype=torch.int64)
        for _, piece in pieces:
            room = _upper(piece, room)
            counts += torch.bincount(room[: piece.numel()], minlength=_BINS)
        places[name] = [_place(counts, kth) for kth in kths[name]]
    found = {}
    for name, pieces in groupby(passes(), itemgetter(0)):
        inside = {top: torch.zeros(_BINS, dtype=torch.int64) for top, _ in places[name]}
        for _, piece in pieces:
            room = _upper(piece, room)
            for top, counts in inside.items():
                # Few are in one bin: only their lower bits are counted.
                numbers = _bits(piece)[room[: piece.numel()] == top]
                counts += torch.bincount(numbers & 0xFFFF, minlength=_BINS)
        bits = [(top << 16) | _place(inside[top], rank)[0] for top, rank in places[name]]
        found[name] = torch.tensor(bits, dtype=torch.int32).view(torch.float32).tolist()
    return found


def drop_below(values: Tensor, threshold: float, out: Tensor) -> Tensor:
    """Keep the numbers whose magnitude reaches a threshold; the others become 0.

    Args:
        values: The numbers.
        threshold: The smallest magnitude that is kept; 0 keeps all.
        out: Where the result goes; it may be `values`.

    Returns:
        The numbers that are kept.
    """
    if threshold <= 0:
        return out.copy_(values)
    # hardshrink keeps numbers above its limit, without a mask; the limit is the next number below.
    limit = torch.nextafter(torch.tensor(threshold, dtype=values.dtype), torch.zeros((), dtype=values.dtype))
    return torch.ops.aten.hardshrink.out(values, float(limit), out=out)


def _bits(magnitudes: Tensor) -> Tensor:
    return magnitudes.float().contiguous().view(torch.int32)


def _upper(magnitudes: Tensor, room: Tensor) -> Tensor:
    """The upper 16 bits of each magnitude, in the same memory for every piece: new memory costs more than the counting."""
    bits = _bits(magnitudes)
    room = room if room.numel() >= bits.numel() else torch.empty_like(bits)
    torch.bitwise_right_shift(bits, 16, out=room[: bits.numel()])
    return room


def _place(counts: Tensor, kth: int) -> tuple[int, int]:
    """The bin that holds the k-th from above, and the rank within that bin."""
    above = counts.flip(0).cumsum(0)
    kth = min(kth, int(above[-1]))
    place = int(torch.searchsorted(above, torch.tensor(kth)))
    return _BINS - 1 - place, kth - (int(above[place - 1]) if place else 0)
