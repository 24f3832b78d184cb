"""The engine's core: stored tensors are read a chunk at a time, a pure function makes the output's chunk.

A merge is a list of `OutputTensor`. A thread reads blocks of every source ahead into reused buffers; each block is cut
into chunks, which the function sees as fp32 (float64 where a source is float64) together with the tensor's name and the
chunk's place in it. `chunks` iterates without writing, for passes that only count or measure;
`hf_continual.merging.engine.writer` writes what the functions return.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from queue import Queue

import torch
from torch import Tensor

from hf_continual.merging.errors import MergeError
from hf_continual.merging.inputs.safetensors_file import DTYPES, Files, StoredTensor, make_buffer, view

CHUNK = (
    262_144  # elements: fp32 operands of one chunk stay in a core's cache; 128 Ki is as fast, 32 Ki and 1 Mi are slower
)
BLOCK = 2 * CHUNK  # elements read at a time: passing a piece between threads costs as much as computing a chunk
BUFFERS = 12 * 2**20  # bytes that read-ahead and operands may take; with many or wide sources the pieces get smaller
WRITTEN = 2**20  # bytes that are handed to the writing thread at a time
SLOTS = 2
_STEP = 4096  # pieces are multiples of this, and so of a memory page


@dataclass
class Chunk:
    """A range of elements of one output tensor.

    Args:
        name: The output tensor.
        shape: Its shape.
        start: First element of the range in the flattened tensor.
        stop: One past the last element.
        first: First element of the range in the flattened sources: equal to `start` in the first part.
        values: The range in each source, flat, in the computation dtype. They are buffers: a function may edit them in
            place and return one, and must not keep them.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    first: int
    values: list[Tensor]


ChunkFunction = Callable[[Chunk], Tensor]


@dataclass(frozen=True)
class Part:
    """Consecutive elements of an output tensor that come from the same sources.

    Args:
        sources: Stored tensors of the same number of elements.
        function: Makes the output's chunk from theirs; None copies the first source's bytes, after a check that the
            other sources hold the same bytes.
        scratch: Bytes that the function needs per chunk on top of its values, if more than a few numbers.
        also: What the function reads whole, in addition to its sources: factors of adapters.
        row: Elements that are never split: chunks begin and end at multiples of it.
    """

    sources: tuple[StoredTensor, ...]
    function: ChunkFunction | None = None
    scratch: int = 0
    also: tuple[StoredTensor, ...] = ()
    row: int = 1

    def whole(self, elements: int) -> int:
        """Round a number of elements down to a multiple of `row`; at least one row."""
        return max(self.row, elements // self.row * self.row)


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written.

    Args:
        name: Its name.
        dtype: Its dtype, as safetensors spells it.
        shape: Its shape.
        parts: Where its elements come from, in order; most tensors have one part, see `stream`.
        produce: Makes a small tensor whole (an adapter's factor), instead of parts.
        scratch: Bytes needed to make it, on top of its own.
        also: Stored tensors that it is made from.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...] = ()
    produce: Callable[[], Tensor] | None = None
    scratch: int = 0
    also: tuple[StoredTensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Total bytes."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def read_bytes(self) -> int:
        """Bytes of its sources."""
        return sum(s.nbytes for part in self.parts for s in part.sources)


def stream(name: str, dtype: str, sources: Iterable[StoredTensor], function: ChunkFunction | None) -> OutputTensor:
    """Make an output tensor whose elements all come from the same sources.

    Args:
        name: Its name.
        dtype: Its dtype, as safetensors spells it.
        sources: Stored tensors of one shape.
        function: Makes the output's chunk from theirs; None copies the first.

    Returns:
        The output tensor.

    Raises:
        MergeError: If the sources differ in shape.
    """
    found = tuple(sources)
    for other in found[1:]:
        if other.shape != found[0].shape:
            raise MergeError(
                f"{name!r} is {list(found[0].shape)} in {found[0].file.path} and {list(other.shape)} in "
                f"{other.file.path}: only tensors of one shape can be combined."
            )
    return OutputTensor(name, dtype, found[0].shape, (Part(found, function),))


@dataclass(frozen=True)
class Sizes:
    """Numbers of elements handled at a time.

    Args:
        chunk: Elements that a function sees.
        block: Elements of each source that are read ahead, a multiple of `chunk`.
    """

    chunk: int
    block: int


def operand_bytes(part: Part) -> int:
    """Bytes per element of converted sources; sources already in the computation dtype stay where they were read."""
    wide = 8 if any(s.dtype == "F64" for s in part.sources) else 4
    return sum(wide for s in part.sources if s.itemsize != wide)


def sizes_for(outputs: Sequence[OutputTensor]) -> Sizes:
    """Choose sizes that keep all buffers within `BUFFERS`, however many sources there are."""
    ahead = operands = 0  # bytes per element
    for part in (p for output in outputs for p in output.parts):
        ahead = max(ahead, SLOTS * sum(s.itemsize for s in part.sources))
        operands = max(operands, operand_bytes(part))
    chunk = max(_STEP, min(CHUNK, BUFFERS // max(ahead + operands, 1) // _STEP * _STEP))
    # A row that must not be split and is longer than a chunk becomes one chunk.
    chunk = max([chunk, *(part.row for output in outputs for part in output.parts)])
    block = (BUFFERS - chunk * operands) // max(ahead, 1) // chunk * chunk
    return Sizes(chunk, max(chunk, min(BLOCK // chunk * chunk, block)))


@dataclass
class _Block:
    output: OutputTensor
    part: Part
    begin: int  # where the part begins in the output
    first: int
    last: int
    slot: list[Tensor]

    def cut(self, elements: int) -> Iterator[Chunk]:
        elements = self.part.whole(elements)
        for at in range(self.first, self.last, elements):
            stop, values = min(at + elements, self.last), []
            for source, buffer in zip(self.part.sources, self.slot, strict=False):
                width = source.itemsize
                piece = buffer[(at - self.first) * width : (stop - self.first) * width]
                values.append(piece.view(DTYPES[source.dtype]))
            yield Chunk(self.output.name, self.output.shape, self.begin + at, self.begin + stop, at, values)


def chunks(outputs: Iterable[OutputTensor]) -> Generator[tuple[OutputTensor, Part, Chunk]]:
    """All chunks of all output tensors in order, read ahead by a thread; nothing is written.

    A copied part (no function) shows its sources in their stored dtype; other sources are converted to fp32, or to
    float64 if one source of the part is float64. Produced tensors are skipped.

    Args:
        outputs: The output tensors.

    Yields:
        The output tensor, its part, and the chunk, whose values are valid until the next one is asked for.

    Raises:
        MergeError: If a file changed or was cut off.
    """
    outputs = list(outputs)
    sizes = sizes_for(outputs)
    free: Queue[list[Tensor]] = Queue()
    filled: Queue[_Block | BaseException | None] = Queue()
    stop = threading.Event()
    for _ in range(SLOTS):
        free.put([])
    reader = threading.Thread(target=_read, args=(outputs, sizes.block, free, filled, stop), daemon=True)
    reader.start()
    operands: list[Tensor] = []
    try:
        while (block := filled.get()) is not None:
            if isinstance(block, BaseException):
                raise block
            for chunk in block.cut(sizes.chunk):
                if block.part.function is not None:
                    chunk.values = _as_operands(chunk.values, operands)
                yield block.output, block.part, chunk
            free.put(block.slot)
    finally:
        stop.set()
        free.put([])
        reader.join()


def _ranges(outputs: list[OutputTensor], elements: int) -> Iterator[tuple[OutputTensor, Part, int, int, int]]:
    for output in outputs:
        begin = 0
        for part in output.parts:
            numel, step = part.sources[0].numel, part.whole(elements)
            for start in range(0, numel, step):
                yield output, part, begin, start, min(start + step, numel)
            begin += numel


def _read(outputs: list[OutputTensor], elements: int, free: Queue, filled: Queue, stop: threading.Event) -> None:
    try:
        with Files() as files:
            for output, part, begin, first, last in _ranges(outputs, elements):
                slot = free.get()
                if stop.is_set():
                    return
                for i, source in enumerate(part.sources):
                    nbytes = (last - first) * source.itemsize
                    if i == len(slot):
                        slot.append(torch.empty(0, dtype=torch.uint8))
                    if slot[i].numel() < nbytes:
                        slot[i] = make_buffer(min(elements, source.numel) * source.itemsize)
                    files.read_into(source, first, last, view(slot[i])[:nbytes])
                filled.put(_Block(output, part, begin, first, last, slot))
        filled.put(None)
    except BaseException as error:
        filled.put(error)


def _as_operands(raw: list[Tensor], operands: list[Tensor]) -> list[Tensor]:
    wide = torch.float64 if any(t.dtype == torch.float64 for t in raw) else torch.float32
    values = []
    for i, stored in enumerate(raw):
        if stored.dtype == wide:
            values.append(stored)
            continue
        if i >= len(operands):
            operands.extend(make_buffer(0) for _ in range(i + 1 - len(operands)))
        if operands[i].numel() < stored.numel() * wide.itemsize:
            operands[i] = make_buffer(stored.numel() * wide.itemsize)
        values.append(operands[i][: stored.numel() * wide.itemsize].view(wide).copy_(stored))
    return values
