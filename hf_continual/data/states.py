"""What a reference model thought of the general samples: one memory-mapped file, whole or absent, never stale.

A safetensors file with the thresholds, where each row's tokens begin, and either two bits per unit (`states`) or the
hidden states in bfloat16 (`hidden`, for imitation losses). Its metadata hold the key that it was made for and a
checksum; a file of another key, or one that was damaged, is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

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
    """Open a file if it is whole and was made for these facts; say why it is not used otherwise."""
    if not file.is_file():
        return None
    small: dict[str, Tensor] = {}
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            small = {name: opened.get_tensor(name) for name in ("offsets", "low", "high")}
        problem = None if json.loads(metadata["facts"]) == facts else "it was made for something else"
        if problem is None and checksum(file) != (file.with_suffix(".sha256")).read_text(encoding="utf-8").strip():
            problem = "its checksum differs"
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        problem = f"it cannot be read ({type(error).__name__}: {error})"
    if problem:
        logger.warning("%s is not used: %s. It is made again.", file, problem)
        return None
    return Recorded(file, small["offsets"].tolist(), small["low"], small["high"])


def checksum(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(opened)


def _digest(opened: Any) -> str:
    digest = hashlib.sha256()
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
) -> Recorded:
    """Record rows with one forward pass each, unless a valid file is there; two processes make one file.

    Args:
        file: Where it goes.
        facts: What it depends on.
        rows: Tokens of each row.
        hidden: Last hidden states (S, D) of a row's tokens.
        threshold: Distance of the thresholds from the mean, in standard deviations.
        keep_hidden: Whether hidden states in bfloat16 are kept instead of their states.
        extra: Further tensors to keep, such as a language-model head.

    Returns:
        The open file.

    Raises:
        OSError: If it cannot be written, such as on a full disk; nothing half-written is left in its place.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    world, rank = _world()
    with FileLock(file.with_suffix(".lock")) if rank == 0 else _Nothing():
        found = open_recorded(file, facts) if rank == 0 else None
        if _agreed(found is not None):
            _wait()
            return found or _open_own(file)
        try:
            _make(file, facts, rows, hidden, threshold, keep_hidden, extra, world, rank)
            _wait()  # process 0 reads the parts of all: none may be removed before it is done
        except OSError as error:
            raise OSError(
                error.errno,
                f"The recorded states could not be written to {file}: {error.strerror or error}. Make room or name "
                f"another cache_dir; about {_size(rows)} tokens have to be kept.",
            ) from error
        finally:
            for part in file.parent.glob(f"{file.stem}.{rank}.*.part"):
                part.unlink(missing_ok=True)
            if rank == 0:
                (file.parent / f"{file.stem}.file.part").unlink(missing_ok=True)
    return _open_own(file)


def _size(rows: Sequence[Sequence[int]]) -> str:
    return f"{sum(map(len, rows)):,}"


def _open_own(file: Path) -> Recorded:
    with safe_open(file, "pt") as opened:
        return Recorded(
            file, opened.get_tensor("offsets").tolist(), opened.get_tensor("low"), opened.get_tensor("high")
        )


def _make(
    file: Path,
    facts: Any,
    rows: Any,
    hidden: Any,
    threshold: float,
    keep_hidden: bool,
    extra: Any,
    world: int,
    rank: int,
) -> None:
    """One pass: hidden states go to a file of this process in their own type, then thresholds, then states."""
    mine = range(rank, len(rows), world)
    statistics = RunningStatistics()
    spill = file.parent / f"{file.stem}.{rank}.spill.part"
    dtype = None
    with spill.open("wb") as out:
        for i in mine:
            part = hidden(rows[i])
            dtype = part.dtype
            statistics.add(part)
            out.write(part.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        out.flush()
        os.fsync(out.fileno())
    statistics = _merged(statistics, world)
    mean_D, std_D = statistics.result()
    low_D, high_D = (mean_D - threshold * std_D).cpu(), (mean_D + threshold * std_D).cpu()
    kept = list(_kept(spill, [len(rows[i]) for i in mine], dtype, low_D, high_D, keep_hidden))
    save_file({str(i): t for i, t in zip(mine, kept, strict=True)}, file.parent / f"{file.stem}.{rank}.kept.part")
    _wait()
    if rank == 0:
        parts = [safe_open(file.parent / f"{file.stem}.{r}.kept.part", "pt") for r in range(world)]
        joined = torch.cat([parts[i % world].get_tensor(str(i)) for i in range(len(rows))])
        offsets = torch.tensor([0, *torch.tensor([len(r) for r in rows]).cumsum(0).tolist()])
        tensors = {
            "hidden" if keep_hidden else "states": joined,
            "offsets": offsets,
            "low": low_D,
            "high": high_D,
            **extra(),
        }
        partial = file.parent / f"{file.stem}.file.part"
        # One entry of metadata: the order of several is not fixed, and the bytes should be.
        save_file(tensors, partial, metadata={"facts": json.dumps(facts, sort_keys=True)})
        with partial.open("rb") as opened:
            os.fsync(opened.fileno())
        from hf_continual.durable import write_text

        write_text(file.with_suffix(".sha256"), checksum(partial))
        partial.replace(file)


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


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def _world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


def _agreed(mine: bool) -> bool:
    """What process 0 found."""
    box = [mine]
    if _world()[0] > 1:
        torch.distributed.broadcast_object_list(box)
    return box[0]


def _wait() -> None:
    if _world()[0] > 1:
        torch.distributed.barrier()


def _merged(statistics: RunningStatistics, world: int) -> RunningStatistics:
    """Statistics over all processes, merged in the order of the processes so that all get the same bits."""
    if world == 1:
        return statistics
    everyone: list[Any] = [None] * world
    own = (statistics.count, statistics.mean_D.cpu(), statistics.squares_D.cpu())
    torch.distributed.all_gather_object(everyone, own)
    merged = RunningStatistics()
    for count, mean_D, squares_D in everyone:
        merged.merge(count, mean_D, squares_D)
    return merged
