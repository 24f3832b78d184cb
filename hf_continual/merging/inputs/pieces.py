"""Stored tensors, read a piece of elements at a time into reused memory: for passes that compute more than they read.

Unlike the engine's chunks, nothing is read ahead, so no thread's allocator retains buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_continual.merging.inputs.safetensors_file import DTYPES, Files, StoredTensor, view

PIECE = 65_536  # elements; the values computed from them stay in a core's cache


def pieces_of(sources: Sequence[StoredTensor], files: Files) -> Iterator[list[Tensor]]:
    """Read tensors of one shape side by side.

    Args:
        sources: The tensors.
        files: Open files.

    Yields:
        The same elements of each, flat, in their own dtypes; valid until the next piece is asked for.
    """
    numel = sources[0].numel
    room = [torch.empty(min(PIECE, numel) * s.itemsize, dtype=torch.uint8) for s in sources]
    for first in range(0, numel, PIECE):
        last, values = min(first + PIECE, numel), []
        for source, buffer in zip(sources, room, strict=True):
            raw = buffer[: (last - first) * source.itemsize]
            files.read_into(source, first, last, view(raw))
            values.append(raw.view(DTYPES[source.dtype]))
        yield values
