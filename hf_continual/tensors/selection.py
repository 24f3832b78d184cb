"""The k-th smallest of many values: in memory, over processes, or over parts that are never in memory together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

BITS = 16  # of a float32, decided in one pass: two passes, 65,536 counters
# Elements counted at a time, which bounds the temporaries: 36 bytes each at their peak. On a CPU they stay in
# the cache; on a device a piece costs two waits, so pieces are larger.
CPU_PIECE, DEVICE_PIECE = 1 << 18, 1 << 22
SMALL = 1 << 16  # up to this many values a CPU partitions a copy faster than it fills the counters


def value_of_rank(values_XN: Tensor, rank: int, by_sorting: bool | None = None) -> Tensor:
    """The value of a rank along the last dimension, 0 for the smallest.

    Args:
        values_XN: Values.
        rank: Rank, from 0 to N - 1.
        by_sorting: Whether to sort. None: on a device, where `kthvalue` is refused under
            `torch.use_deterministic_algorithms` because of its indices, which are not needed here.

    Returns:
        The values, with a last dimension of 1.
    """
    if by_sorting is None:
        by_sorting = values_XN.device.type != "cpu"
    if by_sorting:
        return values_XN.sort(dim=-1).values[..., rank : rank + 1]
    return values_XN.kthvalue(rank + 1, dim=-1, keepdim=True).values


def ordered_keys(values: Tensor) -> Tensor:
    """Integers in 0 to 2^32 - 1 ordered like the float32 values.

    Args:
        values: Any float type; compared as float32.

    Returns:
        int64 of the same shape. Both zeros have the same key.
    """
    return _ordered_bits(values).to(torch.int64) + 2**31


def _ordered_bits(values: Tensor) -> Tensor:
    """int32 ordered like the float32 values."""
    # Adding zero turns -0.0 into 0.0, which compares equal but has other bits.
    bits = (values.float() + 0.0).view(torch.int32)
    # Negative values order the other way round: all bits except the sign are flipped.
    return (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)


def key_value(key: int | Tensor) -> Tensor:
    """The float32 value of a key; the inverse of `ordered_keys`."""
    key = torch.as_tensor(key, dtype=torch.int64)
    return torch.where(key < 2**31, -key - 1, key - 2**31).to(torch.int32).view(torch.float32)


def split(values: Tensor) -> Iterator[Tensor]:
    """Cut values into flat pieces of a bounded number of elements, without copying."""
    yield from values.flatten().split(CPU_PIECE if values.device.type == "cpu" else DEVICE_PIECE)


def kth_smallest(
    parts: Callable[[], Iterable[Tensor]], k: int, add_up: Callable[[Tensor], Tensor] = lambda counts: counts
) -> Tensor:
    """The k-th smallest value of all parts together, exactly, in two passes that count.

    Args:
        parts: Returns the parts afresh on each call; the same values in any order and split. Large ones are counted in
            pieces.
        k: Rank, counted from 0.
        add_up: Sums a tensor of counts over processes that hold different parts.

    Returns:
        float32 scalar on the device of the counts.

    Raises:
        ValueError: If there are `k` values or fewer.
    """
    prefix, below = 0, 0
    for shift in (BITS, 0):
        counts: Tensor | None = None
        for piece in (piece for part in parts() for piece in split(part)):
            keys = _ordered_bits(piece)
            upper = (keys >> BITS).add_(2 ** (BITS - 1))
            digits = upper if shift else keys[upper == prefix].bitwise_and_(2**BITS - 1)
            found = torch.bincount(digits, minlength=2**BITS)
            counts = found if counts is None else counts + found
        if counts is None:
            raise ValueError(f"there is no value number {k} (counted from 0) among 0 values.")
        total = below + add_up(counts).cumsum(0)
        where = int(torch.searchsorted(total, k, right=True))
        if where == 2**BITS:
            raise ValueError(f"there is no value number {k} (counted from 0) among {int(total[-1])} values.")
        below = int(total[where - 1]) if where else below
        prefix = prefix << BITS | where
    return key_value(prefix).to(total.device)


def kth_largest(magnitudes_LN: Tensor, k: int, add_up: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The k-th largest magnitude of each row, exactly, by counting; a device is not waited for.

    Args:
        magnitudes_LN: Values of at least 0 of several tensors of one size, (L, N); compared as float32. Rows may be empty on
            a process that holds no part of them.
        k: Rank, counted from 1.
        add_up: Sums counts over processes that hold different columns, else None.

    Returns:
        (L,), float32.
    """
    if magnitudes_LN.device.type == "cpu" and add_up is None:
        rank = magnitudes_LN.shape[1] - k
        if magnitudes_LN.shape[1] <= SMALL:
            return torch.as_tensor(np.partition(magnitudes_LN.float().numpy(), rank, axis=1)[:, rank])
        return torch.stack([kth_smallest(lambda row=row: [row], rank) for row in magnitudes_LN])
    # Bits of floats of at least 0 are ordered like the floats. The largest key that k values reach is found bit by bit.
    bits_LN = magnitudes_LN.float().view(torch.int32)
    found_L = torch.zeros(len(bits_LN), dtype=torch.int32, device=bits_LN.device)
    for bit in range(30, -1, -1):
        tried_L = found_L | (1 << bit)
        counts_L = (bits_LN >= tried_L[:, None]).sum(dim=1)
        if add_up is not None:
            counts_L = add_up(counts_L)
        found_L = torch.where(counts_L >= k, tried_L, found_L)
    return found_L.view(torch.float32)
