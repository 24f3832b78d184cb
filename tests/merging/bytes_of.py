"""Checksums of a folder's weights. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

import xxhash


def digest(folder: Path) -> dict[str, str]:
    """XXH3 checksum of every weight file of a folder."""
    return {p.name: xxhash.xxh3_128(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}
