"""Elements dropped at random, the same whatever a merge is cut into: bits that are a function of a seed and of the place."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from hf_continual.merging.engine.chunks import Chunk


def bits_at(seed: int, place: int, name: str, start: int, stop: int) -> np.ndarray:
    """Random bits of a range of elements: a function of its arguments alone, whatever ranges they are asked for in.

    Args:
        seed: The merge's seed.
        place: Which model.
        name: The tensor.
        start: First element of the flattened tensor.
        stop: Behind the last.

    Returns:
        uint32 of (stop - start).
    """
    key = hashlib.blake2b(f"{seed}/{place}/{name}".encode(), digest_size=16).digest()
    keys = np.frombuffer(key, np.uint32)
    index = np.arange(start, stop, dtype=np.uint64)
    # Two rounds of a 32-bit mixer (lowbias32), keyed before each: a counter turned into independent bits.
    bits = index.astype(np.uint32) ^ keys[0]
    high = (index >> np.uint64(32)).astype(np.uint32)
    with np.errstate(over="ignore"):
        for word in (keys[1] ^ high, keys[2]):
            bits += word
            bits ^= bits >> np.uint32(16)
            bits *= np.uint32(0x7FEB352D)
            bits ^= bits >> np.uint32(15)
            bits *= np.uint32(0x846CA68B)
            bits ^= bits >> np.uint32(16)
    return bits


def kept_at(seed: int, place: int, name: str, start: int, stop: int, density: float) -> np.ndarray:
    """Which elements of a range are kept.

    Args:
        seed: The merge's seed.
        place: Which model.
        name: The tensor.
        start: First element of the flattened tensor.
        stop: Behind the last.
        density: Probability that an element is kept.

    Returns:
        bool of (stop - start).
    """
    return bits_at(seed, place, name, start, stop) < np.uint32(min(round(density * 2**32), 2**32 - 1))


def dropped(change: Tensor, seed: int, place: int, at: Chunk, density: float) -> Tensor:
    """A change with most of it dropped and the rest rescaled, overwritten.

    Args:
        change: What a model changed of the base, flat.
        seed: The merge's seed.
        place: Which model.
        at: Where the range is.
        density: Probability that an element is kept.

    Returns:
        The change.
    """
    if density >= 1:
        return change
    kept = torch.from_numpy(kept_at(seed, place, at.name, at.start, at.stop, density))
    return change.mul_(kept).div_(density)
