"""Texts that the model writes for methods: the same on one process and on several, and after a kill."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_continual.data.distributed import all_well, gathered, world
from hf_continual.data.sampling import Sampling, sample
from hf_continual.methods.run import Run
from hf_continual.methods.unfinished import Unfinished

Texts = list[list[int]]  # new tokens of several samples
Batch = TypeVar("Batch")
Written = TypeVar("Written")


def write_samples(
    run: Run,
    unfinished: Unfinished,
    openings: Sequence[tuple[Sequence[int], frozenset[int]]],
    number: int,
    how: Sampling,
    batch_rows: int,
    tries: int,
    good: Callable[[int, list[int]], bool],
) -> list[Texts]:
    """Let the model write samples from several openings.

    Each batch has its own seed and is written by one process, so samples do not depend on the number of processes.
    Finished batches are kept after each batch of every process.

    Args:
        run: The run, before its model is wrapped.
        unfinished: Storage of finished batches.
        openings: Tokens to continue and those that end a sample, one pair for each earlier task.
        number: Number of good samples to get from each.
        how: How tokens are drawn.
        batch_rows: Samples written at once.
        tries: Maximum number of times that the missing samples are written.
        good: Whether what was written from an opening counts.

    Returns:
        All samples written from each opening, good or not.
    """
    done, kept = unfinished.read()
    finished = _unpacked(kept) if done else []
    found: list[Texts] = [[] for _ in openings]
    first = 0  # batch of this wave, counted over all waves
    for _ in range(tries):
        missing = [number - sum(good(k, text) for text in texts) for k, texts in enumerate(found)]
        batches = [
            (k, min(batch_rows, count - start))
            for k, count in enumerate(missing)
            for start in range(0, count, batch_rows)
        ]
        while len(finished) < first + len(batches):
            finished += _round(run, batches[len(finished) - first :], len(finished), openings, how)
            unfinished.write(len(finished), _packed(finished))
        for (k, _), texts in zip(batches, finished[first:], strict=False):
            found[k] += texts
        first += len(batches)
    return found


def _round(run: Run, batches: Any, number: int, openings: Any, how: Sampling) -> list[Texts]:
    """The next batches, one on each process."""

    def write(batch: tuple[int, int], place: int) -> Texts:
        k, rows = batch
        with run.autocast():
            opening, ends = openings[k]
            return sample(run.model, run.tokenizer, opening, rows, (run.seed, run.task.index, place), how, ends)

    return one_each(batches, number, write)


def one_each(batches: Sequence[Batch], number: int, write: Callable[[Batch, int], Written]) -> list[Written]:
    """Let each process write one of the next batches.

    Args:
        batches: The batches that are not written yet, in order.
        number: Number of the first of them, counted over the whole pass: a batch's own seed comes from its number.
        write: Writes a batch; gets its number too.

    Returns:
        What was written for the first batches, one per process, or fewer at the end; the same on every process.
    """
    size, rank = world()
    mine, problem = None, None
    try:
        if rank < len(batches):
            mine = write(batches[rank], number + rank)
    except Exception as error:
        problem = error
    all_well(problem)
    return gathered(mine)[: min(size, len(batches))]


def _packed(batches: Sequence[Texts]) -> dict[str, Tensor]:
    texts = [text for batch in batches for text in batch]
    return {
        "batches": torch.tensor([len(batch) for batch in batches], dtype=torch.int64),
        "lengths": torch.tensor([len(text) for text in texts], dtype=torch.int64),
        "tokens": torch.tensor([token for text in texts for token in text], dtype=torch.int64),
    }


def _unpacked(kept: Mapping[str, Tensor]) -> list[Texts]:
    texts = [part.tolist() for part in kept["tokens"].split(kept["lengths"].tolist())]
    found, start = [], 0
    for count in kept["batches"].tolist():
        found.append(texts[start : start + count])
        start += count
    return found
