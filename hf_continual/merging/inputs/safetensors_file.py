"""Read safetensors files without loading them: headers first, tensors a range of elements at a time.

A safetensors file begins with the length of its header (8 bytes), then the header (JSON: name -> dtype, shape, byte
range), then the bytes. So everything but the values is known after a few kilobytes, and the values are read with
`pread` into buffers that the caller reuses; nothing is mapped, nothing is held.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from hf_continual.merging.errors import MergeError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
_LARGEST_HEADER = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class StoredFile:
    """A safetensors file at the time its header was read.

    Args:
        path: Where it is.
        size: Bytes.
        mtime_ns: When it was last written, in nanoseconds.
        header_sha256: Fingerprint of its header.
    """

    path: Path
    size: int
    mtime_ns: int
    header_sha256: str

    def check_unchanged(self) -> None:
        """Refuse to continue with a file that has changed.

        Raises:
            MergeError: If its size or modification time has changed since the header was read, or the file is gone.
        """
        try:
            now = self.path.stat()
        except FileNotFoundError:
            raise MergeError(f"{self.path} was removed while it was merged. Restore it and start again.") from None
        if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
            raise MergeError(
                f"{self.path} changed while it was merged: {self.size} bytes, written at {self.mtime_ns} ns, when the "
                f"merge was planned; {now.st_size} bytes, written at {now.st_mtime_ns} ns, now. The output was not "
                f"touched. Start again once nothing writes to it."
            )


class Lens(Protocol):
    """Presents other values than the stored ones, of the same dtype and shape."""

    def read_into(self, files: Files, tensor: StoredTensor, start: int, stop: int, buffer: memoryview) -> None:
        """Like `Files.read_into`."""
        ...

    def memory(self, elements: int) -> int:
        """Upper bound on the bytes for reading so many elements at a time, on top of the buffer."""
        ...


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored.

    Args:
        name: Its name in the file.
        file: The file.
        dtype: Its dtype as safetensors spells it, such as ``"BF16"``.
        shape: Its shape.
        offset: First byte in the file.
        lens: What it is read through, or None for its stored bytes.
    """

    name: str
    file: StoredFile
    dtype: str
    shape: tuple[int, ...]
    offset: int
    lens: Lens | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Total bytes."""
        return self.numel * self.itemsize

    @property
    def is_float(self) -> bool:
        """Whether it can be averaged."""
        return self.dtype in FLOATS

    def rows(self, first: int, last: int) -> StoredTensor:
        """The rows `first` to `last` (exclusive) as a separate tensor; nothing is read."""
        row = prod(self.shape[1:]) * self.itemsize
        return replace(self, shape=(last - first, *self.shape[1:]), offset=self.offset + first * row)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the tensors of a safetensors file by name, in the order of their bytes.

    Args:
        path: The file.

    Returns:
        Where each tensor is stored.

    Raises:
        MergeError: If the file is cut off, not a safetensors file, or holds a dtype that cannot be merged.
    """
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_LARGEST_HEADER, found.st_size - 8):
            raise MergeError(
                f"{path} ({found.st_size} bytes) is not a safetensors file, or was cut off: its header would be {length} "
                f"bytes long. Download or save it again."
            )
        raw = file.read(length)
    stored = StoredFile(path, found.st_size, found.st_mtime_ns, hashlib.sha256(raw).hexdigest())
    tensors = _tensors(stored, raw)
    _check_readable(path)
    return tensors


def _tensors(stored: StoredFile, raw: bytes) -> dict[str, StoredTensor]:
    """The tensors of a header, which must fill the file without gaps."""
    path, values, tensors, at = stored.path, 8 + len(raw), {}, 0
    for name, dtype, shape, begin, end in _entries(path, raw):
        if dtype not in DTYPES:
            raise MergeError(
                f"{path} stores {name!r} as {dtype}; only {', '.join(DTYPES)} can be read. Convert the model to "
                f"bfloat16 or float16 first (load it and save it with dtype=)."
            )
        tensor = StoredTensor(name, stored, dtype, shape, values + begin)
        if tensor.nbytes != end - begin or values + end > stored.size:
            raise MergeError(
                f"{path} is cut off or damaged: {name!r} should take {tensor.nbytes} bytes up to byte "
                f"{values + end}; its header gives it {end - begin}, and the file ends at {stored.size}."
            )
        if begin != at:
            raise MergeError(
                f"{path} is damaged: {name!r} begins at byte {begin} of the values, and the tensor before it ends at {at}: "
                + ("they share bytes" if begin < at else "the bytes between belong to no tensor")
                + ". Download or save it again."
            )
        at = end
        tensors[name] = tensor
    if values + at != stored.size:
        raise MergeError(
            f"{path} is damaged: its last tensor ends at byte {values + at} but the file at {stored.size}: the bytes "
            f"after it belong to no tensor. Download or save it again."
        )
    return tensors


def _entries(path: Path, raw: bytes) -> list[tuple[str, str, tuple[int, ...], int, int]]:
    """The header's entries in the order of their bytes: name, dtype, shape, first byte, one past the last byte."""
    again = "Download or save it again."
    try:
        header = json.loads(raw, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise MergeError(f"{path} has a header that cannot be read: {error}. {again}") from error
    if not isinstance(header, dict):
        raise MergeError(f"{path} has a header that holds no tensors by name. {again}")
    header.pop("__metadata__", None)
    found = []
    for name, entry in header.items():
        said = entry if isinstance(entry, dict) else {}
        shape, offsets = said.get("shape"), said.get("data_offsets")
        whole = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
        if not whole or not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, *offsets)):
            raise MergeError(f"{path} is damaged: its header has {entry!r} for {name!r}. {again}")
        found.append((name, str(said.get("dtype")), tuple(shape), *offsets))
    return sorted(found, key=lambda entry: entry[3:])


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it lists {next(n for n in names if names.count(n) > 1)!r} twice")
    return found


def _check_readable(path: Path) -> None:
    """Refuse what the safetensors library refuses, since every user of the model reads it with that library."""
    try:
        with safe_open(path, "np"):
            pass
    except SafetensorError as error:
        raise MergeError(f"{path} cannot be read by safetensors: {error}. Download or save it again.") from error


def make_buffer(nbytes: int) -> torch.Tensor:
    """A uint8 buffer whose memory goes back to the system when it is freed; the allocator would keep it."""
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)


def view(buffer: torch.Tensor) -> memoryview:
    """The bytes of a uint8 tensor, to read into or write from."""
    return memoryview(buffer.numpy())  # pyrefly: ignore[bad-argument-type]


class Files:
    """Open files, each opened once, to read ranges of tensors from. Leaving the ``with`` closes them."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self.kept: dict[Lens, Any] = {}  # a lens's data on the tensor being read

    def read_into(self, tensor: StoredTensor, start: int, stop: int, buffer: memoryview) -> None:
        """Read elements `start` to `stop` of the flattened tensor into a writable buffer of exactly their size.

        Args:
            tensor: The tensor.
            start: First element.
            stop: One past the last element.
            buffer: Where the bytes go.

        Raises:
            MergeError: If the file ends too early.
        """
        if tensor.lens is not None:
            tensor.lens.read_into(self, tensor, start, stop, buffer)
            return
        path = tensor.file.path
        if path not in self._open:
            tensor.file.check_unchanged()
            self._open[path] = os.open(path, os.O_RDONLY)
        at, done = tensor.offset + start * tensor.itemsize, 0
        while done < len(buffer):
            got = os.preadv(self._open[path], [buffer[done:]], at + done)
            if got == 0:
                raise MergeError(
                    f"{path} ended at byte {at + done} while {tensor.name!r} was being read: it was cut off."
                )
            done += got

    def load(self, tensor: StoredTensor) -> torch.Tensor:
        """A whole, small tensor (an adapter's factor) in its own dtype."""
        raw = torch.empty(tensor.nbytes, dtype=torch.uint8)
        if tensor.nbytes:
            self.read_into(tensor, 0, tensor.numel, view(raw))
        return raw.view(DTYPES[tensor.dtype]).view(tensor.shape)

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()
