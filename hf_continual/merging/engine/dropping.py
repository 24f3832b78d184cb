"""Drop elements at random, independently of chunking: the bits are a function of a seed and of the position."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from hf_continual.merging.engine.chunks import Chunk
from hf_continual.merging.engine.room import Room

_PIECE = 65_536  # elements whose bits are generated at a time; they stay in a core's cache
_STEPS = np.arange(_PIECE, dtype=np.uint32)
# lowbias32: a mixer of 32 bits. Two rounds, keyed before each, turn a counter into independent bits.
_MIXER = ((np.uint32(16), np.uint32(0x7FEB352D)), (np.uint32(15), np.uint32(0x846CA68B)))


def bits_at(seed: int, place: int, name: str, start: int, stop: int, room: Room | None = None) -> np.ndarray:
    """Random bits for a range of elements: a function of its arguments alone, however the elements are split into ranges.

    Args:
        seed: The merge's seed.
        place: Index of the model.
        name: The tensor.
        start: First element of the flattened tensor.
        stop: One past the last.
        room: Memory for them, reused by the next call.

    Returns:
        uint32 of (stop - start).
    """
    key = hashlib.blake2b(f"{seed}/{place}/{name}".encode(), digest_size=16).digest()
    first, second, third = np.frombuffer(key, np.uint32)[:3]
    room = room or Room()
    found, other = (
        room.take(key, count, torch.int32).numpy().view(np.uint32)
        for key, count in (("bits", stop - start), ("shifted", _PIECE))
    )
    at = start
    while at < stop:
        # A piece begins and ends at multiples of its size, so that none crosses a multiple of 2^32.
        begin = at - at % _PIECE
        end = min(begin + _PIECE, stop)
        bits, rest = found[at - start : end - start], other[: end - at]
        np.add(_STEPS[at - begin : end - begin], np.uint32(begin & 0xFFFFFFFF), out=bits)
        bits ^= first
        with np.errstate(over="ignore"):
            for word in (second ^ np.uint32(begin >> 32), third):
                bits += word
                for shift, factor in _MIXER:
                    bits ^= np.right_shift(bits, shift, out=rest)
                    bits *= factor
                bits ^= np.right_shift(bits, np.uint32(16), out=rest)
        at = end
    return found


def kept_at(
    seed: int, place: int, name: str, start: int, stop: int, density: float, room: Room | None = None
) -> np.ndarray:
    """Decide which elements of a range are kept.

    Args:
        seed: The merge's seed.
        place: Index of the model.
        name: The tensor.
        start: First element of the flattened tensor.
        stop: One past the last.
        density: Probability that an element is kept.
        room: Scratch memory.

    Returns:
        bool of (stop - start).
    """
    return bits_at(seed, place, name, start, stop, room) < np.uint32(min(round(density * 2**32), 2**32 - 1))


def dropped(change: Tensor, seed: int, place: int, at: Chunk, density: float, room: Room | None = None) -> Tensor:
    """Drop most of a change and rescale the rest, in place.

    Args:
        change: A model's change from the base, flat.
        seed: The merge's seed.
        place: Index of the model.
        at: Position of the range.
        density: Probability that an element is kept.
        room: Scratch memory.

    Returns:
        The change.
    """
    if density >= 1:
        return change
    # Computed in the change's dtype: torch is several times slower on mixed dtypes.
    room = room or Room()
    factors = room.take("kept", change.numel(), torch.float32)
    np.copyto(factors.numpy(), kept_at(seed, place, at.name, at.start, at.stop, density, room))
    return change.mul_(factors).div_(density)
