"""A safetensors file that can tell by itself whether it is whole: one of its tensors is a digest of all the rest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

DIGEST = "digest"
SIZE = hashlib.sha256().digest_size
BLOCK = 1 << 20  # bytes read at once


def empty_digest() -> Tensor:
    """The digest's placeholder until `seal`; uint8, shape (32,)."""
    return torch.zeros(SIZE, dtype=torch.uint8)


def seal(file: Path) -> None:
    """Write the digest into a file that was saved with an empty one."""
    place = _place(file)
    assert place is not None
    digest = _digest(file, place)
    with file.open("r+b") as opened:
        opened.seek(place)
        opened.write(digest)


def whole_by_digest(file: Path) -> bool:
    """Whether a file has a digest and all other bytes are as they were when it was sealed."""
    place = _place(file)
    if place is None:
        return False
    with file.open("rb") as opened:
        opened.seek(place)
        noted = opened.read(SIZE)
    return noted == _digest(file, place)


def _place(file: Path) -> int | None:
    """Offset of the digest in the file."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        entry = json.loads(opened.read(size)).get(DIGEST)
    return None if entry is None else 8 + size + int(entry["data_offsets"][0])


def _digest(file: Path, place: int) -> bytes:
    """SHA-256 of all bytes except the digest's own."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(min(BLOCK, place - opened.tell())):
            digest.update(block)
        opened.seek(place + SIZE)
        while block := opened.read(BLOCK):
            digest.update(block)
    return digest.digest()
