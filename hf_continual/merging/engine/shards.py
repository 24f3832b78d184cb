"""How an output is laid out in files, known before a value is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from hf_continual.merging.engine.chunks import SLOTS, WRITTEN, OutputTensor, operand_bytes, sizes_for
from hf_continual.merging.inputs.safetensors_file import DTYPES


@dataclass(frozen=True)
class Shard:
    """One file of the output.

    Args:
        file: Its name.
        tensors: What it holds, in the order of its bytes.
    """

    file: str
    tensors: tuple[OutputTensor, ...]

    @property
    def header(self) -> bytes:
        """The first bytes of the file: the header's length and the header."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in self.tensors:
            begin, end = end, end + tensor.nbytes
            entries[tensor.name] = {
                "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end],
            }  # fmt: skip
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(t.nbytes for t in self.tensors)


def make_shards(outputs: Sequence[OutputTensor], max_shard_size: int, stem: str = "model") -> list[Shard]:
    """Distribute tensors over files as transformers does: in order, a new file when one would get too large.

    Args:
        outputs: The tensors in order.
        max_shard_size: Bytes of tensors per file; a larger tensor gets a file of its own.
        stem: Name of the file without its suffix.

    Returns:
        The shards; one is called ``STEM.safetensors``, several ``STEM-00001-of-0000N.safetensors``.
    """
    groups: list[list[OutputTensor]] = [[]]
    size = 0
    for output in outputs:
        if groups[-1] and size + output.nbytes > max_shard_size:
            groups.append([])
            size = 0
        groups[-1].append(output)
        size += output.nbytes
    # Wide dtypes first, so that every tensor begins at a multiple of its item size.
    groups = [sorted(g, key=lambda t: -DTYPES[t.dtype].itemsize) for g in groups]
    if len(groups) == 1:
        return [Shard(f"{stem}.safetensors", tuple(groups[0]))]
    return [Shard(f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors", tuple(g)) for i, g in enumerate(groups, 1)]


def index_of(shards: Sequence[Shard]) -> dict[str, object]:
    """The index of a sharded checkpoint, with the true sizes."""
    tensors = [t for s in shards for t in s.tensors]
    return {
        "metadata": {
            "total_parameters": sum(prod(t.shape) for t in tensors),
            "total_size": sum(t.nbytes for t in tensors),
        },
        "weight_map": {t.name: s.file for s in shards for t in s.tensors},
    }


def memory_bound(shards: Sequence[Shard]) -> int:
    """Upper bound on the bytes of buffers for writing, whatever the size of tensors, shards and models."""
    outputs = [t for s in shards for t in s.tensors]
    sizes = sizes_for(outputs)
    read = sizes.block * SLOTS * max((sum(s.itemsize for s in p.sources) for t in outputs for p in t.parts), default=0)
    computed = sizes.chunk * max((operand_bytes(p) + 8 for t in outputs for p in t.parts), default=0)
    written = SLOTS * max(WRITTEN, sizes.chunk * max((DTYPES[t.dtype].itemsize for t in outputs), default=4))
    produced = max((2 * t.nbytes + t.scratch for t in outputs if t.produce is not None), default=0)
    scratch = max((p.scratch for t in outputs for p in t.parts), default=0)
    lenses = {s.lens for t in outputs for p in t.parts for s in p.sources if s.lens is not None}
    scratch += max((lens.memory(sizes.block) for lens in lenses), default=0)
    return read + computed + written + produced + scratch
