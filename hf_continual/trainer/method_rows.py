"""Rows that methods add: tokenised like the task's rows, and mixed in with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hf_continual import private
from hf_continual.data.rows import digest_of
from hf_continual.trainer import checks
from hf_continual.trainer.collating import replay_collator
from hf_continual.trainer.mixer import ReplayMixer
from hf_continual.trainer.rows import check_row_type, check_rows, report_dropped, same_order, says_completion

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

    from hf_continual.data.replay import RowType
    from hf_continual.trainer.live import LiveTrainer


def mixer_of(trainer: LiveTrainer) -> ReplayMixer | None:
    """Build the mixer of the rows that the methods add.

    Args:
        trainer: The trainer, set up except for its methods.

    Returns:
        The mixer, or None if no method adds rows.

    Raises:
        ValueError: If rows cannot be tokenised or collated, or the model does not know their tokens.
    """
    sources = {m.name: rows for m in trainer.methods if (rows := m.replay(trainer.run)) is not None}
    if not sources:
        return None
    checks.check_replay(trainer, sources)
    prepared = [prepare_rows(trainer, s.rows, s.row_type, name) for name, s in sources.items()]
    checks.check_token_ids(trainer, dict(zip(sources, prepared, strict=True)))
    collators = [replay_collator(trainer, rows, name) for name, rows in zip(sources, prepared, strict=True)]
    return ReplayMixer(
        sources,
        prepared,
        collators[0],
        accumulation=trainer.args.gradient_accumulation_steps,
        world_size=trainer.args.world_size,
        rank=trainer.args.process_index,
        seed=trainer.run.seed,
        ledger=trainer.ledger,
    )


def mix_prepared_rows(trainer: LiveTrainer) -> None:
    """Add rows that methods have made in `prepare` to the mix."""
    if any(method.makes_rows() for method in trainer.methods):
        trainer.mixer = mixer_of(trainer)


def prepare_rows(trainer: LiveTrainer, rows: Dataset, row_type: RowType | str, name: str) -> Dataset:
    """Tokenise rows with the same code that tokenised the task's rows.

    Args:
        trainer: The trainer.
        rows: Raw or tokenised rows.
        row_type: ``"same"`` as the task's, or the type that the rows deliberately have.
        name: The caller, for messages and progress bars.

    Returns:
        Rows with `input_ids` and `labels`, at least one, none longer than `max_length`.

    Raises:
        ValueError: If the rows are of another type, one of them is invalid, or truncation leaves
            no trainable token in any.
    """
    text = trainer.args.dataset_text_field
    if rows.format["type"] != "custom":  # rows under a transform are refused below, by SFTTrainer
        rows = rows.with_format(None)
    found = check_row_type(rows[0], trainer.task_row, row_type, text, name)  # pyrefly: ignore[bad-argument-type]
    formatting = private.formatting_of(trainer) if row_type == "same" and found != "tokenized" else None
    if formatting is None:
        check_rows(rows, found, text, name)
    completion_only = trainer.completion_only_loss
    if (row_type != "same" and found.startswith("prompt_completion")) or (
        found == "tokenized" and says_completion(rows, trainer.task_row, trainer.args.completion_only_loss, name)
    ):
        trainer.completion_only_loss = True
    try:
        args = same_order(trainer.args)
        prepared: Any = private.tokenised(trainer, rows, args, formatting, name)
    finally:
        trainer.completion_only_loss = completion_only
    report_dropped(len(rows), len(prepared), trainer.args.max_length, name)
    prepared = prepared.select_columns(["input_ids", "labels"])
    trainer.row_digests[name] = digest_of(prepared)
    return prepared


def replay_totals(trainer: LiveTrainer) -> np.ndarray | None:
    """Task tokens, replayed tokens and rows drawn, (sources, slots, 3), over all processes; all must call this together."""
    if trainer.mixer is None:
        return None
    counters = torch.from_numpy(trainer.mixer.counters()).to(trainer.accelerator.device)
    return trainer.accelerator.reduce(counters, reduction="sum").cpu().numpy()  # pyrefly: ignore[missing-attribute]
