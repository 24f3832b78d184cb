"""Per-token values of rows, recorded once with a reference model: one memory-mapped file, whole or absent, never stale.

Anything that compares a model with a reference model's values on the same rows (states, log-probabilities, token
scores) records them here: one pass split over the processes, with a progress bar; if killed, it resumes where it was.
The metadata hold the facts a file was made for, and it has a checksum; a file for other facts, or a damaged one, is
made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_continual.atomic_files import write_text
from hf_continual.data.cache import cannot_write, locked
from hf_continual.data.digest import DIGEST, empty_digest, seal, whole_by_digest
from hf_continual.data.distributed import all_well, from_first, gathered, world
from hf_continual.data.spill import Keeping, Spill

logger = logging.getLogger(__name__)

DIGITS = 16  # of a fingerprint in the name of a file


@dataclass(frozen=True)
class Recorded:
    """An open file of recorded rows.

    Args:
        file: Its path.
        offsets: Token at which each row begins, and the end; (K + 1).
    """

    file: Path
    offsets: list[int]

    def row(self, index: int, tokens: int, what: str = "values") -> Tensor:
        """The first tokens of one row; reads its own bytes only.

        Args:
            index: Index of the row.
            tokens: Number of its tokens to read.
            what: Name of the tensor.

        Returns:
            Shape (tokens, ...).
        """
        start, end = self.offsets[index], self.offsets[index + 1]
        if tokens > end - start:
            raise ValueError(
                f"{self.file} holds {end - start} tokens of general row {index} and the run has {tokens}: the row was tokenised "
                f"or truncated differently. Remove the file."
            )
        with safe_open(self.file, "pt") as opened:
            return opened.get_slice(what)[start : start + tokens]

    def between(self, start: int, end: int, what: str = "values") -> Tensor:
        """Values number `start` to `end` of all rows, one after the other; reads their own bytes only."""
        with safe_open(self.file, "pt") as opened:
            return opened.get_slice(what)[start:end]

    def tensor(self, name: str) -> Tensor:
        """A whole tensor of the file."""
        with safe_open(self.file, "pt") as opened:
            return opened.get_tensor(name)


def key_of(facts: Mapping[str, Any]) -> str:
    """A hash of facts, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def facts_of(file: Path) -> dict[str, Any]:
    """The facts a file was made for; empty if it cannot be read."""
    try:
        with safe_open(file, "pt") as opened:
            return json.loads((opened.metadata() or {})["facts"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return {}


def open_recorded(file: Path, facts: Mapping[str, Any], small: Sequence[str] = ()) -> Recorded | None:
    """Open a file if it is whole and was made for these facts; log the reason if it is not used.

    If only the checksum next to a file is damaged, and the file is whole by its own digest, the checksum is repaired.

    Args:
        file: The file.
        facts: The facts it must have been made for.
        small: Further tensors that it must hold.

    Returns:
        The open file, or None.
    """
    if not file.is_file():
        return None
    offsets: Tensor | None = None
    sums = file.with_suffix(".sha256")
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            offsets = opened.get_tensor("offsets")
            for name in small:
                opened.get_tensor(name)
        problem = None if json.loads(metadata["facts"]) == facts else "it was made for something else"
        if problem is None and (wrong := _checksum_problem(file, sums)):
            if not whole_by_digest(file):
                problem = wrong
            else:
                logger.warning("%s is damaged (%s), but %s is whole: the checksum is written again.", sums, wrong, file)
                write_text(sums, checksum(file))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        problem = f"it cannot be read ({type(error).__name__}: {error})"
    if problem or offsets is None:
        logger.warning("%s is not used: %s. It is made again.", file, problem)
        return None
    return Recorded(file, offsets.tolist())


def open_whole(file: Path) -> Recorded:
    """Open a file that was checked."""
    with safe_open(file, "pt") as opened:
        return Recorded(file, opened.get_tensor("offsets").tolist())


def _checksum_problem(file: Path, sums: Path) -> str | None:
    try:
        noted = sums.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        return f"it cannot be read ({type(error).__name__}: {error})"
    return None if checksum(file) == noted else "its checksum differs"


def checksum(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def record(
    file: Path,
    facts: dict[str, Any],
    rows: Sequence[Any],
    values: Callable[[Any], Tensor],
    keeping: Keeping | None = None,
    extra: Callable[[], dict[str, Tensor]] = dict,
    able: bool = True,
    title: str = "recording",
) -> Recorded:
    """Record rows with one forward pass each, unless there is a valid file; two runs at once make one file.

    Args:
        file: Path to write to.
        facts: The facts it depends on.
        rows: What `values` takes, one for each row, such as its tokens; its length is the number of values, at least 1.
        values: Values (S, ...) of a row.
        keeping: Chooses the values to keep.
        extra: Further tensors to keep, such as a language-model head.
        able: Whether this process holds the weights; process 0 must, the others leave the rows to those that do.
        title: Title of the progress bar.

    Returns:
        The open file.

    Raises:
        OSError: If it cannot be written, for example on a full disk; no half-written file is left.
        ValueError: If the recorded values cannot be used.
    """
    keeping = keeping or Keeping()
    with locked(file):
        if from_first(lambda: open_recorded(file, facts, keeping.small) is not None):
            return open_whole(file)
        own = f"{file.stem}.{world()[1]}.*.part"
        try:
            _make(file, facts, rows, values, keeping, extra, able, title)
        except (OSError, SafetensorError) as error:
            _remove(file.parent, own)
            raise cannot_write(
                file, error, f"the values of about {sum(map(len, rows)):,} tokens have to be kept"
            ) from error
        except Exception:
            _remove(file.parent, own)
            raise
        _remove(file.parent, own)  # a stopped process leaves them, and resumes from them
    return open_whole(file)


def _remove(folder: Path, pattern: str) -> None:
    for part in folder.glob(pattern):
        part.unlink(missing_ok=True)


def _make(file: Path, facts: Any, rows: Any, values: Any, keeping: Keeping, extra: Any, able: bool, title: str) -> None:
    """One pass: values go to a file of this process in their own dtype, then the kept ones into one shared file."""
    rank = world()[1]
    workers = [r for r, holds in enumerate(gathered(able)) if holds]
    mine = range(workers.index(rank), len(rows), len(workers)) if able else range(0)
    # The number of processes is part of the name: another number splits the rows differently, and starts again.
    spill = Spill(file.parent / f"{file.stem}.{rank}.{len(workers)}.spill.part")
    problem = None
    try:
        spill.fill([rows[i] for i in mine], values, keeping, title)
    except OSError as error:
        problem = error
    all_well(problem)
    more = keeping.seen()
    try:
        kept = [keeping.keep(part) for part in spill.parts([len(rows[i]) for i in mine])]
        save_file({str(i): t for i, t in zip(mine, kept, strict=True)}, file.parent / f"{file.stem}.{rank}.kept.part")
        del kept
    except (OSError, SafetensorError) as error:
        problem = error
    all_well(problem)

    def join() -> None:
        parts = {r: safe_open(file.parent / f"{file.stem}.{r}.kept.part", "pt") for r in workers}
        joined = torch.cat([parts[workers[i % len(workers)]].get_tensor(str(i)) for i in range(len(rows))])
        offsets = torch.tensor([0, *torch.tensor([len(r) for r in rows]).cumsum(0).tolist()])
        write_recorded(file, facts, {keeping.what: joined, "offsets": offsets, **more, **extra()})

    from_first(join)  # all wait for it: no part may be removed before it is read


def write_recorded(file: Path, facts: Any, tensors: dict[str, Tensor]) -> None:
    """Write a file completely or not at all, and its checksum next to it.

    Args:
        file: Path to write to.
        facts: The facts it is made for.
        tensors: Its tensors.
    """
    partial = file.parent / f"{file.stem}.0.file.part"
    # One entry of metadata: the order of several is not fixed, and the bytes should be.
    save_file({**tensors, DIGEST: empty_digest()}, partial, metadata={"facts": json.dumps(facts, sort_keys=True)})
    seal(partial)
    with partial.open("rb") as opened:
        os.fsync(opened.fileno())
    write_text(file.with_suffix(".sha256"), checksum(partial))
    partial.replace(file)


def taken_out(file: Path) -> dict[str, Tensor]:
    """All tensors of a file except its digest, for someone who does not have the model it was recorded with.

    They are copies: a file that is damaged later does not damage them.
    """
    return {name: tensor.clone() for name, tensor in load_file(file).items() if name != DIGEST}


def put_back(file: Path, facts: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write what `taken_out` returned into this machine's cache, byte for byte the original file.

    Args:
        file: Path to write to.
        facts: The facts it was made for.
        tensors: Its tensors.

    Raises:
        OSError: If it cannot be written.
    """
    with locked(file):
        if from_first(lambda: open_recorded(file, facts) is not None):
            return
        try:
            from_first(lambda: write_recorded(file, facts, dict(tensors)))
        except (OSError, SafetensorError) as error:
            raise cannot_write(file, error, "states that came with the model are kept there") from error
