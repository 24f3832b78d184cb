"""ReplayMixer: the trainer's side of replay: draws, merges, counts, and the state in a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_continual.data.collator import ORIGIN, ReplayCollator, task_tokens
from hf_continual.data.replay import ReplayDraw, ReplayRows, owed_per_token
from hf_continual.data.rows import row_lengths

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_continual.trainer.ledger import Ledger

logger = logging.getLogger(__name__)


class ReplayMixer:
    """Mixes the rows of all sources into the micro-batches of each optimizer step.

    Args:
        sources: Rows by the name of the method that adds them.
        rows: The same rows tokenised, in the same order.
        collator: Merges drawn rows into a collated batch.
        accumulation: Micro-batches of an optimizer step on one process.
        world_size: Number of processes.
        rank: Index of this process.
        seed: Seed of the draws.
        ledger: Where the achieved ratio is logged.
    """

    def __init__(
        self,
        sources: dict[str, ReplayRows],
        rows: list[Dataset],
        collator: ReplayCollator,
        accumulation: int,
        world_size: int,
        rank: int,
        seed: int,
        ledger: Ledger,
    ) -> None:
        self.names = tuple(sources)
        self.sources = tuple(sources.values())
        self.rows = rows
        self.collator = collator
        self.world_size, self.rank, self.ledger = world_size, rank, ledger
        self.draws = [
            ReplayDraw(
                lengths=row_lengths(prepared).tolist(),
                seed=seed,
                source=index,
                owed_per_token=owed,
                per_batch=source.per_batch if source.pair is None else 0,
                slots=accumulation * world_size,
            )
            for index, (source, prepared, owed) in enumerate(
                zip(self.sources, rows, owed_per_token([s.ratio for s in self.sources]), strict=True)
            )
        ]
        self.pairs = [(k, source.pair) for k, source in enumerate(self.sources) if source.pair is not None]
        self.settled = self._counted()
        # Sources with a fixed number of rows go first: the ratios count their tokens as given.
        self.order = sorted(range(len(self.draws)), key=lambda i: self.draws[i].per_batch is None)

    def reset(self) -> None:
        """Reset all counts for a new run."""
        for draw in self.draws:
            draw.counters[:] = 0
        self.settle()

    def settle(self) -> None:
        """End an optimizer step: its draws are final, and later draws belong to the next step."""
        self.settled = self._counted()

    def mixed(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The micro-batches of one optimizer step, each with its replay rows, drawn lazily."""
        for micro, batch in enumerate(batches):
            tokens = task_tokens(batch)
            slot = micro * self.world_size + self.rank
            drawn: list[tuple[int, int, dict[str, Any]]] = []
            per_source = [0] * len(self.draws)
            fixed = 0
            for source, _, length in batch.get(ORIGIN, {}).get("drawn", ()):  # paired with the task's rows
                per_source[source] += length
                self.draws[source].counters[slot] += (0, length, 1)
            for source in self.order:
                draw = self.draws[source]
                for row in draw.draw(slot, tokens, fixed):
                    drawn.append((source, row, self.rows[source][row]))
                    per_source[source] += draw.lengths[row]
                fixed += int(draw.counters[slot, 1]) if draw.per_batch is not None else 0
            for name, replayed in zip(self.names, per_source, strict=True):
                self.ledger.add(f"{name}/share", replayed, tokens + sum(per_source))
            yield self.collator.merge(batch, drawn)

    def counters(self) -> np.ndarray:
        """Counters of all sources as the last step left them, (sources, slots, 3); only this process's slots are filled.

        The next step's batches are drawn ahead: a checkpoint written in the meantime must not count them.
        """
        return self.settled

    def _counted(self) -> np.ndarray:
        return np.stack([draw.counters for draw in self.draws])

    def resume(self, counters: np.ndarray) -> None:
        """Load the counters of all processes, keeping this process's slots."""
        if counters.shape[1] != self.draws[0].slots:
            logger.warning(
                "The checkpoint was written with %d micro-batches per optimizer step over all processes, but this "
                "run has %d: the replay ratio continues from the same totals, but the rows differ from the ones the "
                "uninterrupted run would have drawn.",
                counters.shape[1],
                self.draws[0].slots,
            )
        for draw, counted in zip(self.draws, counters, strict=True):
            draw.resume(counted)
            others = np.arange(draw.slots) % self.world_size != self.rank
            draw.counters[others] = 0
        self.settle()

    def report(self, totals: np.ndarray) -> None:
        """Log what was replayed, and warn if the requested ratio was missed.

        Args:
            totals: Counters summed over processes and slots, (sources, 3).
        """
        mix = int(totals[0, 0] + totals[:, 1].sum())
        for name, source, draw, (_, replayed, rows) in zip(
            self.names, self.sources, self.draws, totals.tolist(), strict=True
        ):
            share = replayed / max(mix, 1)
            if source.pair is not None:
                logger.info("%s: %d rows with %d tokens were trained next to the task's.", name, rows, replayed)
                continue
            logger.info(
                "%s: %d rows with %d tokens were replayed, %.2f %% of %d tokens; each of its %d rows was seen %.1f "
                "times.",
                name, rows, replayed, 100 * share, mix, len(draw.lengths), rows / len(draw.lengths),
            )  # fmt: skip
            if source.ratio is not None and abs(share - source.ratio) > 0.1 * source.ratio:
                logger.warning(
                    "%s: ratio=%g was requested and %.4f achieved (%d of %d tokens). Rows are whole and hold %.0f "
                    "tokens on average, while this run had room for %.0f replayed tokens: shorter rows or a longer "
                    "run would come closer.",
                    name, source.ratio, share, replayed, mix, float(np.mean(draw.lengths)), source.ratio * mix,
                )  # fmt: skip
