"""Write a checkpoint without ever holding its values in memory: headers first, then chunks in order, then one rename.

Names, shapes and dtypes of the output are known before a value is read, so a shard's header is written first and its
size is final. Three threads share the work: one reads ahead, the caller computes, one writes and hashes; a fourth flushes
finished bytes to disk, so that the last wait is short. Each finished shard is noted in the journal.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from queue import Queue
from typing import Any

import torch
import xxhash
from torch import Tensor

from hf_continual.disk import CannotWrite, size
from hf_continual.merging.engine.chunks import CHUNK, SLOTS, WRITTEN, Chunk, Part, chunks
from hf_continual.merging.engine.shards import Shard
from hf_continual.merging.engine.staging import Staging
from hf_continual.merging.errors import MergeError
from hf_continual.merging.inputs.safetensors_file import DTYPES, Files, StoredFile, StoredTensor, make_buffer, view

SYNC_EVERY = 64 * 2**20  # bytes after which written pages are flushed to disk while the next ones are computed


def write_shards(
    shards: Sequence[Shard],
    work: Staging,
    on_bytes: Callable[[int], None] = lambda _: None,
    also: Sequence[StoredFile] = (),
) -> dict[str, dict[str, object]]:
    """Write the shards that are not finished yet.

    Args:
        shards: The shards.
        work: Where they go, and the journal.
        on_bytes: Called with the bytes of every chunk read and written.
        also: Further files that must not change meanwhile, in addition to those read in chunks (adapters).

    Returns:
        Size and XXH3 checksum of each file by name.

    Raises:
        MergeError: If a source holds or yields a number that is not finite, changed, or differs where it is copied.
        OSError: If the disk is full; finished files stay, and the same merge resumes from them.
    """
    for shard in shards:
        if shard.file in work.finished:
            on_bytes(sum(t.nbytes + t.read_bytes for t in shard.tensors))
    todo = [s for s in shards if s.file not in work.finished]
    with _Writer(work) as writer:
        for shard in todo:
            files = {s.file.path: s.file for t in shard.tensors for p in t.parts for s in p.sources}
            writer.begin(shard, [*files.values(), *also])
            _write_tensors(shard, writer, on_bytes)
            writer.end()
    return {s.file: work.finished[s.file] for s in shards}


def _write_tensors(shard: Shard, writer: _Writer, on_bytes: Callable[[int], None]) -> None:
    read = chunks([t for t in shard.tensors if t.parts])
    try:
        for tensor in shard.tensors:
            dtype = DTYPES[tensor.dtype]
            if tensor.produce is not None:
                made = tensor.produce()
                if tuple(made.shape) != tensor.shape:
                    raise ValueError(f"{tensor.name}: planned as {tensor.shape}, produced as {tuple(made.shape)}")
                for piece in made.contiguous().flatten().split(CHUNK):
                    writer.write(
                        piece,
                        dtype,
                        lambda tensor=tensor: _blame_factors(tensor.also) or _too_large(tensor.name, tensor.dtype),
                    )
                on_bytes(tensor.nbytes)
                continue
            done, numel = 0, prod(tensor.shape)
            while done < numel:
                _, part, chunk = next(read)
                result = _copied(part, chunk) if part.function is None else part.function(chunk)
                writer.write(
                    result, dtype, lambda part=part, chunk=chunk, tensor=tensor: _blame(part, chunk, tensor.dtype)
                )
                done = chunk.stop
                width = dtype.itemsize + sum(s.itemsize for s in part.sources)
                on_bytes((chunk.stop - chunk.start) * width)
    finally:
        read.close()


def _copied(part: Part, chunk: Chunk) -> Tensor:
    for source, other in zip(part.sources[1:], chunk.values[1:], strict=True):
        if not torch.equal(chunk.values[0], other):
            raise MergeError(
                f"{chunk.name!r} ({part.sources[0].dtype}) cannot be averaged and differs between "
                f"{part.sources[0].file.path.parent} and {source.file.path.parent}. Merge models whose tensors of this "
                f"dtype are equal."
            )
    return chunk.values[0]


def _check_finite(values: Tensor, written: Tensor, blame: Callable[[], str]) -> None:
    # One fast pass (a dot product runs at the speed of the cache) rules out inf, nan and what the dtype cannot hold: no
    # element is larger than the norm. Only where that is not enough is every element looked at.
    if not values.is_floating_point():
        return
    if values.dtype not in (torch.float32, torch.float64):  # copied unchanged
        if not bool(torch.isfinite(values).all()):
            raise MergeError(blame())
        return
    if float(torch.dot(values, values)) ** 0.5 < torch.finfo(written.dtype).max:
        return
    if not bool(torch.isfinite(written).all()):
        raise MergeError(blame())


def _blame(part: Part, chunk: Chunk, dtype: str) -> str:
    """Message that names the source of a number that is not finite; the sources are read again, as functions work in place."""
    with Files() as files:
        for source in part.sources:
            source = replace(source, lens=None)
            raw = torch.empty((chunk.stop - chunk.start) * source.itemsize, dtype=torch.uint8)
            files.read_into(source, chunk.first, chunk.first + chunk.stop - chunk.start, view(raw))
            bad = ~torch.isfinite(raw.view(DTYPES[source.dtype]))
            if bool(bad.any()):
                at = int(bad.nonzero()[0])
                return (
                    f"{source.name!r} of {source.file.path.parent} is {raw.view(DTYPES[source.dtype])[at].item()} at "
                    f"element {chunk.first + at}. A model with such a number is broken; leave it out, or save it again."
                )
    return _blame_factors(part.also) or _too_large(
        chunk.name, dtype, f" between elements {chunk.start} and {chunk.stop}"
    )


def _blame_factors(stored: Sequence[StoredTensor]) -> str | None:
    """Message that names the adapter with a number that is not finite, if there is one."""
    with Files() as files:
        for tensor in stored:
            values = files.load(tensor).flatten()
            bad = ~torch.isfinite(values)
            if bool(bad.any()):
                at = int(bad.nonzero()[0])
                return (
                    f"{tensor.name!r} of {tensor.file.path.parent} is {values[at].item()} at element {at}. An adapter with such "
                    f"a number is broken; leave it out, or save it again."
                )
    return None


def _too_large(name: str, dtype: str, where: str = "") -> str:
    return (
        f"{name!r} would get a number that {dtype} cannot hold{where}, although every input is finite. Give dtype='bfloat16' or "
        f"dtype='float32', or smaller weights."
    )


@dataclass
class _Open:
    descriptor: int
    shard: Shard
    path: Path
    sources: list[StoredFile]
    at: int = 0
    synced: int = 0
    pending: list[Future] = field(default_factory=list)

    def append(self, data: memoryview) -> None:
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self.descriptor, data[done:], self.at + done)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise CannotWrite(
                    errno.ENOSPC,
                    f"The disk is full: {self.shard.file} needs {size(self.shard.size)} and only {size(self.at + done)} fit. The "
                    f"finished files stay in {self.path.parent.parent}; free some space and the same call resumes",
                ) from None
        self.at += done


class _Writer:
    """Rounds chunks into buffers that one thread hashes and writes and another puts on the disk."""

    def __init__(self, work: Staging) -> None:
        self._work = work
        self._free: Queue[Tensor] = Queue()
        self._todo: Queue[tuple[Any, ...]] = Queue()
        self._failed: BaseException | None = None
        self._digest = xxhash.xxh3_128()
        self._files: list[Future] = []
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="merge-disk")
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._buffer, self._used = torch.empty(0, dtype=torch.uint8), 0
        for _ in range(SLOTS - 1):
            self._free.put(torch.empty(0, dtype=torch.uint8))

    def __enter__(self) -> _Writer:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._todo.put(("stop",))
        self._thread.join()
        self._disk.shutdown(wait=True)
        if kind is None:
            if self._failed is not None:
                raise self._failed
            for file in self._files:
                file.result()

    def begin(self, shard: Shard, sources: list[StoredFile]) -> None:
        """Start a file; its sources are checked again when it ends."""
        self._digest = xxhash.xxh3_128(shard.header)
        self._todo.put(("begin", shard, sources))

    def write(self, values: Tensor, dtype: torch.dtype, blame: Callable[[], str]) -> None:
        """Append values, rounded once to the dtype; `blame` makes the message if one is not finite."""
        nbytes = values.numel() * dtype.itemsize
        if self._used + nbytes > self._buffer.numel() or self._used % dtype.itemsize:
            self._hand_over(nbytes)
        place = self._buffer[self._used : self._used + nbytes]
        _check_finite(values, place.view(dtype).copy_(values), blame)
        # Hashed here, while it is in the cache, and not in the writing thread, which keeps a core busy by itself.
        self._digest.update(view(place))
        self._used += nbytes

    def _hand_over(self, needed: int = 0) -> None:
        """Give what is in the buffer to the writing thread and take a free one with room for `needed` bytes."""
        if self._used:
            self._todo.put(("data", self._buffer, self._used))
            self._buffer, self._used = self._free.get(), 0
        if self._failed is not None:
            raise self._failed
        if self._buffer.numel() < needed:
            self._buffer = make_buffer(max(WRITTEN, needed))

    def end(self) -> None:
        """Finish the file."""
        self._hand_over()
        self._todo.put(("end", self._digest.hexdigest()))

    def _run(self) -> None:
        now: _Open | None = None
        try:
            while (item := self._todo.get())[0] != "stop":
                if item[0] == "begin":
                    now = self._open(item[1], item[2])
                elif item[0] == "data":
                    assert now is not None
                    now.append(view(item[1])[: item[2]])
                    self._free.put(item[1])
                    if now.at - now.synced >= SYNC_EVERY:
                        now.synced = now.at
                        now.pending.append(self._disk.submit(os.fdatasync, now.descriptor))
                else:
                    assert now is not None
                    for source in now.sources:
                        source.check_unchanged()
                    self._files.append(self._disk.submit(self._finish, now, item[1]))
                    now = None
        except BaseException as error:
            self._failed = error
            self._free.put(torch.empty(0, dtype=torch.uint8))  # whoever waits for a buffer wakes up and sees the error
        finally:
            if now is not None:
                self._disk.submit(os.close, now.descriptor)

    def _open(self, shard: Shard, sources: list[StoredFile]) -> _Open:
        path = self._work.out / shard.file
        # 0666 less the umask, as for any file; safetensors' own writer leaves 0600.
        opened = _Open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), shard, path, sources)
        opened.append(memoryview(shard.header))
        return opened

    def _finish(self, file: _Open, checksum: str) -> None:
        try:
            for synced in file.pending:
                synced.result()
            os.fsync(file.descriptor)
        finally:
            os.close(file.descriptor)
        self._work.record(file.shard.file, {"size": file.at, "xxh3_128": checksum})
