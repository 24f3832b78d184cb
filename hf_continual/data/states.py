"""What a reference model thought of the general samples: one memory-mapped file, whole or absent, never stale.

A safetensors file with the thresholds, where each row's tokens begin, and either two bits per unit (`states`) or the
hidden states in bfloat16 (`hidden`, for imitation losses). Its metadata hold the key that it was made for and a
checksum; a file of another key, or one that was damaged, is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_continual.data.digest import DIGEST, empty_digest, seal, whole_by_digest
from hf_continual.data.together import all_well, from_first, gathered, world
from hf_continual.disk import FULL, CannotWrite, free_space, size
from hf_continual.durable import write_text
from hf_continual.tensors.ternary import RunningStatistics, activation_states, pack_states

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recorded:
    """An open file of recorded rows.

    Args:
        file: Where it is.
        offsets: Token at which each row begins, and the end; (K + 1).
        low_D: Lower thresholds.
        high_D: Upper thresholds.
    """

    file: Path
    offsets: list[int]
    low_D: Tensor
    high_D: Tensor

    def row(self, index: int, tokens: int, what: str = "states") -> Tensor:
        """The first tokens of one row; reads its own bytes only.

        Args:
            index: Which row.
            tokens: How many of its tokens.
            what: ``"states"`` (packed) or ``"hidden"``.

        Returns:
            Shape (tokens, bytes or channels).
        """
        start, end = self.offsets[index], self.offsets[index + 1]
        if tokens > end - start:
            raise ValueError(
                f"{self.file} holds {end - start} tokens of general row {index} and the run has {tokens}: they were tokenised "
                f"or cut differently. Remove the file."
            )
        with safe_open(self.file, "pt") as opened:
            return opened.get_slice(what)[start : start + tokens]

    def tensor(self, name: str) -> Tensor:
        """A whole tensor of the file."""
        with safe_open(self.file, "pt") as opened:
            return opened.get_tensor(name)


def key_of(facts: dict[str, Any]) -> str:
    """16 hexadecimal digits of facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def open_recorded(file: Path, facts: dict[str, Any]) -> Recorded | None:
    """Open a file if it is whole and was made for these facts; say why it is not used otherwise.

    A file that is whole by its own digest is kept where only the checksum beside it is damaged, and that is repaired.
    """
    if not file.is_file():
        return None
    small: dict[str, Tensor] = {}
    sums = file.with_suffix(".sha256")
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            small = {name: opened.get_tensor(name) for name in ("offsets", "low", "high")}
        problem = None if json.loads(metadata["facts"]) == facts else "it was made for something else"
        if problem is None and (wrong := _checksum_problem(file, sums)):
            if not whole_by_digest(file):
                problem = wrong
            else:
                logger.warning("%s is damaged (%s), but %s is whole: the checksum is written again.", sums, wrong, file)
                write_text(sums, checksum(file))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        problem = f"it cannot be read ({type(error).__name__}: {error})"
    if problem:
        logger.warning("%s is not used: %s. It is made again.", file, problem)
        return None
    return Recorded(file, small["offsets"].tolist(), small["low"], small["high"])


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
    rows: Sequence[Sequence[int]],
    hidden: Callable[[Sequence[int]], Tensor],
    threshold: float,
    keep_hidden: bool = False,
    extra: Callable[[], dict[str, Tensor]] = dict,
    able: bool = True,
) -> Recorded:
    """Record rows with one forward pass each, unless a valid file is there; two runs at once make one file.

    Args:
        file: Where it goes.
        facts: What it depends on.
        rows: Tokens of each row.
        hidden: Last hidden states (S, D) of a row's tokens.
        threshold: Distance of the thresholds from the mean, in standard deviations.
        keep_hidden: Whether hidden states in bfloat16 are kept instead of their states.
        extra: Further tensors to keep, such as a language-model head.
        able: Whether this process holds the weights; process 0 must, the others leave the rows to those that do.

    Returns:
        The open file.

    Raises:
        OSError: If it cannot be written, such as on a full disk; nothing half-written is left in its place.
        ValueError: If the hidden states are not finite.
    """
    with locked(file):
        if from_first(lambda: open_recorded(file, facts) is not None):
            return open_whole(file)
        try:
            _make(file, facts, rows, hidden, threshold, keep_hidden, extra, able)
        except (OSError, SafetensorError) as error:
            raise cannot_write(file, error, f"about {sum(map(len, rows)):,} tokens have to be kept") from error
        finally:
            for part in file.parent.glob(f"{file.stem}.{world()[1]}.*.part"):
                part.unlink(missing_ok=True)
    return open_whole(file)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """While one run makes a file, others that want it wait.

    Args:
        file: The file; its folder is made.

    Yields:
        None: While process 0 of this run holds the lock.

    Raises:
        OSError: If there is no way of writing there.
    """
    lock = FileLock(file.with_suffix(".lock"))

    def take() -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            raise cannot_write(file, error, "states of general samples are kept there") from error

    from_first(take)
    try:
        yield
    finally:
        lock.release()


def cannot_write(file: Path, error: Exception, why: str) -> OSError:
    """What to say where a file of the cache cannot be written."""
    said, number = getattr(error, "strerror", None) or error, getattr(error, "errno", None)
    room = f" ({size(free_space(file))} are free there)" if number in FULL else ""
    return CannotWrite(
        number, f"{file} could not be written: {said}{room}. Make room or name another cache_dir; {why}."
    )


def open_whole(file: Path) -> Recorded:
    """Open a file that was checked."""
    with safe_open(file, "pt") as opened:
        return Recorded(
            file, opened.get_tensor("offsets").tolist(), opened.get_tensor("low"), opened.get_tensor("high")
        )


def _make(
    file: Path, facts: Any, rows: Any, hidden: Any, threshold: float, keep_hidden: bool, extra: Any, able: bool
) -> None:
    """One pass: hidden states go to a file of this process in their own type, then thresholds, then states."""
    rank = world()[1]
    workers = [r for r, holds in enumerate(gathered(able)) if holds]
    mine = range(workers.index(rank), len(rows), len(workers)) if able else range(0)
    statistics, spill = RunningStatistics(), file.parent / f"{file.stem}.{rank}.spill.part"
    dtype, problem = None, None
    try:
        with spill.open("wb") as out:
            for i in mine:
                part = hidden(rows[i])
                dtype = part.dtype
                statistics.add(part)
                out.write(part.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    except OSError as error:
        problem = error
    all_well(problem)
    mean_D, std_D = _merged(statistics).result()
    low_D, high_D = (mean_D - threshold * std_D).cpu(), (mean_D + threshold * std_D).cpu()
    if not (torch.isfinite(low_D).all() and torch.isfinite(high_D).all()):
        raise ValueError(
            f"The reference model gives hidden states that are not finite ({int((~torch.isfinite(low_D)).sum())} of "
            f"{low_D.numel()} channels), so they have no thresholds. Load it in bfloat16 or float32."
        )
    try:
        kept = list(_kept(spill, [len(rows[i]) for i in mine], dtype, low_D, high_D, keep_hidden))
        save_file({str(i): t for i, t in zip(mine, kept, strict=True)}, file.parent / f"{file.stem}.{rank}.kept.part")
        del kept
    except (OSError, SafetensorError) as error:
        problem = error
    all_well(problem)

    def join() -> None:
        parts = {r: safe_open(file.parent / f"{file.stem}.{r}.kept.part", "pt") for r in workers}
        joined = torch.cat([parts[workers[i % len(workers)]].get_tensor(str(i)) for i in range(len(rows))])
        offsets = torch.tensor([0, *torch.tensor([len(r) for r in rows]).cumsum(0).tolist()])
        what = "hidden" if keep_hidden else "states"
        tensors = {what: joined, "offsets": offsets, "low": low_D, "high": high_D, **extra()}
        partial = file.parent / f"{file.stem}.0.file.part"
        # One entry of metadata: the order of several is not fixed, and the bytes should be.
        save_file({**tensors, DIGEST: empty_digest()}, partial, metadata={"facts": json.dumps(facts, sort_keys=True)})
        seal(partial)
        with partial.open("rb") as opened:
            os.fsync(opened.fileno())
        write_text(file.with_suffix(".sha256"), checksum(partial))
        partial.replace(file)

    from_first(join)  # all wait for it: no part may be removed before it was read


def _kept(
    spill: Path, lengths: Sequence[int], dtype: torch.dtype | None, low_D: Tensor, high_D: Tensor, keep_hidden: bool
) -> Iterable[Tensor]:
    """What is kept of each row, read back row by row."""
    channels = low_D.numel()
    with spill.open("rb") as opened:
        for length in lengths:
            assert dtype is not None
            size = length * channels * torch.empty((), dtype=dtype).element_size()
            part = torch.frombuffer(bytearray(opened.read(size)), dtype=dtype).view(length, channels)
            yield part.to(torch.bfloat16) if keep_hidden else pack_states(activation_states(part, low_D, high_D))


def _merged(statistics: RunningStatistics) -> RunningStatistics:
    """Statistics over all processes, merged in the order of the processes so that all get the same bits."""
    if world()[0] == 1:
        return statistics
    merged = RunningStatistics()
    own = (statistics.count, statistics.mean_D.cpu(), statistics.squares_D.cpu())
    for count, mean_D, squares_D in gathered(own):
        merged.merge(count, mean_D, squares_D)
    return merged
