"""The unfinished half of a recording pass: values of rows, in a file that the pass resumes from."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from tqdm.auto import tqdm

from hf_continual.data.distributed import world

logger = logging.getLogger(__name__)

HEAD = 128  # bytes before the values: their dtype and shape
SUM = 8  # bytes after the values of each row: their checksum: a power cut may leave rows of zeros
SYNC = 64  # rows after which the file is synced to disk


class Keeping:
    """Choice of the values to keep of each row: all of them, unless a subclass overrides this.

    Class attributes:
        what: Name of the tensor in the file.
        small: Further tensors that the file needs to be usable.
    """

    what = "values"
    small: tuple[str, ...] = ()

    def see(self, values: Tensor) -> None:
        """See the values of one of this process's rows, in order; also those of rows seen by an interrupted pass."""

    def seen(self) -> dict[str, Tensor]:
        """Called when every process has seen its rows; returns further tensors of the file, the same on all."""
        return {}

    def keep(self, values: Tensor) -> Tensor:
        """The values to keep of one row, shape (S, ...)."""
        return values


class Spill:
    """Values of a process's rows, one after the other, in the dtype they were computed in.

    Args:
        file: Its path.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.shape: tuple[int, ...] = ()
        self.dtype: torch.dtype | None = None

    def fill(self, rows: Sequence[Any], values: Any, keeping: Keeping, title: str) -> None:
        """Compute the values of rows that are not in the file yet.

        Args:
            rows: What `values` takes, one for each row; its length is the number of values.
            values: Computes the values of a row.
            keeping: Sees all of them, in order.
            title: Title of the progress bar.

        Raises:
            OSError: If they cannot be written.
        """
        done = 0
        for part in self._there(rows):
            keeping.see(part)
            done += 1
        if done:
            logger.info("%s: %d of %d rows were recorded earlier", title, done, len(rows))
        with self.file.open("ab") as out:
            bar = tqdm(
                rows[done:], desc=title, initial=done, total=len(rows), disable=None if world()[1] == 0 else True
            )
            for i, tokens in enumerate(bar, start=1):
                part = values(tokens).detach()
                if self.dtype is None:
                    self.dtype, self.shape = part.dtype, tuple(part.shape[1:])
                    said = {"dtype": str(part.dtype).removeprefix("torch."), "shape": list(self.shape)}
                    out.write(json.dumps(said).encode().ljust(HEAD))
                keeping.see(part)
                raw = part.cpu().contiguous().view(torch.uint8).numpy().data
                out.write(raw)
                out.write(xxhash.xxh3_64_digest(raw))
                if i % SYNC == 0:
                    out.flush()
                    os.fsync(out.fileno())

    def _there(self, rows: Sequence[Any]) -> Iterator[Tensor]:
        """Complete rows of an interrupted pass; the file is truncated after the last of them."""
        if not self.file.is_file():
            return
        whole = 0
        with self.file.open("rb") as opened, contextlib.suppress(ValueError, KeyError, AttributeError, TypeError):
            said = json.loads(opened.read(HEAD))
            self.dtype, self.shape = getattr(torch, said["dtype"]), tuple(said["shape"])
            for row in rows:
                raw = opened.read(self._bytes(len(row)))
                if len(raw) < self._bytes(len(row)) or opened.read(SUM) != xxhash.xxh3_64_digest(raw):
                    break
                yield self._part(raw, len(row))
                whole = opened.tell()
        if not whole:
            self.dtype = None
        os.truncate(self.file, whole)

    def _bytes(self, tokens: int) -> int:
        assert self.dtype is not None
        return tokens * torch.Size(self.shape).numel() * torch.empty((), dtype=self.dtype).element_size()

    def parts(self, lengths: Sequence[int]) -> Iterable[Tensor]:
        """The values of each row, read back row by row.

        Args:
            lengths: Tokens of each row.

        Yields:
            Tensor: Shape (S, ...).
        """
        with self.file.open("rb") as opened:
            opened.seek(HEAD)
            for length in lengths:
                yield self._part(opened.read(self._bytes(length)), length)
                opened.seek(SUM, os.SEEK_CUR)

    def _part(self, raw: bytes, tokens: int) -> Tensor:
        assert self.dtype is not None
        return torch.frombuffer(bytearray(raw), dtype=self.dtype).view(tokens, *self.shape)
