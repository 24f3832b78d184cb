"""Scratch memory that a rule reuses for every range.

A new tensor of a megabyte is requested from the system and returned each time, and touching its pages for the first time
costs more than computing on it: rules are three to eight times faster with memory that they keep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_continual.merging.inputs.safetensors_file import make_buffer


class Room:
    """Named scratch tensors. Each rule has its own, and runs in one thread."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, key: str, count: int, dtype: torch.dtype) -> Tensor:
        """Return a flat tensor with arbitrary content; the next range gets the same memory.

        Args:
            key: Name of the tensor within the rule.
            count: Elements.
            dtype: Their dtype.

        Returns:
            The tensor.
        """
        nbytes = count * dtype.itemsize
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < nbytes:
            buffer = self._buffers[key] = make_buffer(nbytes)
        return buffer[:nbytes].view(dtype)

    def like(self, values: Tensor, key: str) -> Tensor:
        """Like `take`, with the number of elements and the dtype of another tensor."""
        return self.take(key, values.numel(), values.dtype)
