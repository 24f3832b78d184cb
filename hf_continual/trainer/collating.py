"""Check at construction, not in the first step, whether a run's data collator can take a method's rows."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset

from hf_continual import private
from hf_continual.data.collator import ROW, CountTokens, NameRows, PairRows, ReplayCollator
from hf_continual.data.flat_rows import UNMASKED

if TYPE_CHECKING:
    from hf_continual.trainer.live import LiveTrainer


@contextmanager
def same_randomness() -> Iterator[None]:
    """Restore the random states on exit: some collators mask or augment."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


def check_collates(trainer: LiveTrainer, prepared: Dataset, name: str) -> bool:
    """Refuse a data collator that cannot take the tokenised rows of a method.

    Args:
        trainer: The trainer, set up except for its methods.
        prepared: Tokenised rows.
        name: Name of the method that adds the rows.

    Returns:
        Whether it joins several rows into one long row.

    Raises:
        ValueError: If it fails, or does not return rows of tokens.
    """
    with same_randomness():
        return _flattens(trainer.data_collator, [prepared[i % len(prepared)] for i in range(2)], name)


def replay_collator(trainer: LiveTrainer, prepared: Dataset, name: str) -> ReplayCollator:
    """Build a collator that adds a method's rows to the task's batches, and try it on two rows of each.

    Args:
        trainer: The trainer, set up except for its methods.
        prepared: Tokenised rows.
        name: Name of the method that adds the rows.

    Returns:
        The collator; whether it flattens is detected from its output.

    Raises:
        ValueError: If the data collator cannot take tokenised rows, or its batches cannot be merged.
    """
    collate, tokenizer = trainer.data_collator, private.tokenizer_of(trainer)
    pads = (getattr(collate, "pad_token_id", None), tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad = next(token for token in pads if token is not None)
    rows = [prepared[i % len(prepared)] for i in range(2)]
    made = ReplayCollator(collate, check_collates(trainer, prepared, name), pad)
    with same_randomness():
        task = _task_batch(trainer)
        try:
            made.merge(made.collate(rows) if task is None else task, [(0, i, row) for i, row in enumerate(rows)])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return made


@contextmanager
def tokens_counted(trainer: LiveTrainer) -> Iterator[None]:
    """Make a data loader created inside the context count the tokens of its batches, if replay needs them.

    Args:
        trainer: The trainer.

    Yields:
        None: While its collator counts.
    """
    collate = trainer.data_collator
    if trainer.mixer is not None and not trainer.args.accelerator_config.dispatch_batches:
        trainer.data_collator = CountTokens(collate)
    try:
        yield
    finally:
        trainer.data_collator = collate


@contextmanager
def rows_named(trainer: LiveTrainer) -> Iterator[None]:
    """Make a data loader created inside the context report each token's row of the task, if a method asks.

    Args:
        trainer: The trainer.

    Yields:
        None: While its rows carry their index.

    Raises:
        ValueError: If the rows are a stream, or are tokenised only by the collator.
    """
    asking = [type(m).__name__ for m in trainer.methods if m.reads_row_ids()]
    if not asking:
        yield
        return
    rows, collate = trainer.run.task_rows, trainer.data_collator
    if "input_ids" not in rows.column_names:
        raise ValueError(
            f"{asking[0]} looks values up by a token's place in its row, but the rows have no tokens before they are "
            f"collated (columns {rows.column_names}). Give rows that SFTTrainer tokenises, or drop the method."
        )
    seen = trainer.train_dataset
    trainer.train_dataset = seen.add_column(ROW, list(range(len(rows))))  # pyrefly: ignore
    trainer.data_collator = NameRows(collate)
    try:
        with private.column_kept(trainer, ROW):
            yield
    finally:
        trainer.train_dataset, trainer.data_collator = seen, collate


@contextmanager
def rows_paired(trainer: LiveTrainer) -> Iterator[None]:
    """Make a data loader created inside the context put rows that methods pair with the task's rows next to them.

    Args:
        trainer: The trainer.

    Yields:
        None: While its collator does so.
    """
    collate, mixer, names = trainer.data_collator, trainer.mixer, ()
    if mixer is not None and mixer.pairs:
        trainer.data_collator = PairRows(collate, mixer.collator, mixer.pairs)
        names = getattr(trainer.train_dataset, "column_names", None) or ()
    kept = private.column_kept(trainer, UNMASKED) if UNMASKED in names else nullcontext()
    try:
        with kept:
            yield
    finally:
        trainer.data_collator = collate


def _flattens(collate: Any, rows: list[dict[str, Any]], name: str) -> bool:
    """Whether the collator joins two rows into one long row."""
    kind = type(collate).__name__ if not hasattr(collate, "__name__") else collate.__name__
    advice = (
        "Such rows are tokenised before training and can join batches only if the collator takes tokenised rows: "
        "tokenise the task's rows too and leave data_collator out, or let the collator take both."
    )
    try:
        batch = collate([dict(row) for row in rows])
        shape = tuple(batch["input_ids"].shape)
        labels = tuple(batch["labels"].shape)
    except Exception as error:
        raise ValueError(
            f"{name}: the data collator {kind} cannot collate rows of input_ids and labels "
            f"({type(error).__name__}: {error}). {advice}"
        ) from error
    if len(shape) != 2 or shape[0] not in (1, 2) or labels != shape:
        raise ValueError(
            f"{name}: the data collator {kind} makes input_ids of shape {shape} and labels of shape {labels} from two "
            f"rows; rows can only join batches of shape (rows, tokens) or (1, tokens). Use another data collator."
        )
    return shape[0] == 1


def _task_batch(trainer: LiveTrainer) -> dict[str, Any] | None:
    """Two rows of the task as a batch, or None for a stream, or if SFTTrainer will fail by itself."""
    rows: Any = trainer.train_dataset
    if not isinstance(rows, Dataset):
        return None
    try:
        collate = private.task_collator(trainer)
        return dict(collate([rows[i % len(rows)] for i in range(2)]))
    except Exception:
        return None
