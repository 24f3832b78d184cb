"""Determine the type of a dataset's rows, and whether two types may be mixed."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_continual.data.row_values import TEXTUAL, check_values
from hf_continual.data.rows import row_lengths
from hf_continual.trl_data import is_conversational

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_continual.data.replay import RowType

logger = logging.getLogger(__name__)

# Columns that mark which tokens of a tokenised row are trained.
PER_TOKEN = ("labels", "completion_mask", "assistant_masks")


def row_type(row: dict[str, Any], text_field: str) -> str:
    """The type of a raw or tokenised row.

    Args:
        row: One row.
        text_field: Name of the column that holds plain text.

    Returns:
        ``"tokenized"``, ``"messages"``, ``"prompt_completion"`` (of strings or of messages) or ``"text"``;
        for anything else the column names, which equal only themselves.
    """
    if "input_ids" in row:
        return "tokenized"
    if "messages" in row or "conversations" in row:
        return "messages"
    if "prompt" in row and "completion" in row:
        return "prompt_completion of messages" if is_conversational(row) else "prompt_completion"
    if text_field in row:
        return "text"
    return f"columns {sorted(row)}"


def check_row_type(row: dict[str, Any], task_row: dict[str, Any], wanted: RowType, text_field: str, who: str) -> str:
    """Refuse replay rows that are not of the type the run expects.

    Args:
        row: A replay row.
        task_row: A raw row of the task.
        wanted: ``"same"``, or the declared type of the rows.
        text_field: Name of the column that holds plain text.
        who: Name of the method, for the message.

    Returns:
        The type of `row`.

    Raises:
        ValueError: If the type differs from the task's, or from the declared one.
    """
    found, task = row_type(row, text_field), row_type(task_row, text_field)
    if found == "tokenized":
        return found
    if wanted == "same" and found != task:
        raise ValueError(
            f"{who}: the replay rows are {found} and the task's rows are {task}. If mixed, one of the two "
            f"would be trained on the wrong tokens. Convert the rows to {task}, tokenise them to input_ids and "
            f"labels, or confirm the mix with row_type={found.split()[0]!r}."
        )
    if wanted != "same" and found.split()[0] != wanted:
        raise ValueError(f"{who}: row_type={wanted!r} was given, but the rows are {found} (columns {sorted(row)}).")
    return found


def same_order(args: Any) -> Any:
    """Training arguments that keep the order of rows: methods refer to rows by index, and draw them at random."""
    kept = copy.copy(args)
    kept.shuffle_dataset = False
    return kept


def check_rows(rows: Dataset, found: str, text_field: str, who: str) -> None:
    """Refuse rows if one does not match the type of the first.

    Args:
        rows: Raw or tokenised rows.
        found: Their type.
        text_field: Name of the column that holds plain text.
        who: Name of the method, for the message.

    Raises:
        ValueError: If a text is missing or is not text, or a tokenised row has no tokens, or labels or a mask of
            a different length.
    """
    if found == "tokenized":
        _check_tokenized(rows, who)
    elif found == "text":
        check_values(rows.rename_column(text_field, "text") if text_field != "text" else rows, who, ("text",))
    elif found.startswith(("prompt_completion", "messages")):
        check_values(rows, who, TEXTUAL[1:])


def _check_tokenized(rows: Dataset, who: str) -> None:
    column: Any = rows.select_columns(["input_ids"]).with_format("arrow")[:]["input_ids"]
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_integer(kind.value_type):
        raise ValueError(f"{who}: 'input_ids' must hold lists of token ids, but holds {kind}.")
    lengths = np.asarray(pc.fill_null(pc.list_value_length(column), 0))  # pyrefly: ignore[missing-attribute]
    if not lengths.all():
        raise ValueError(
            f"{who}: {int((lengths == 0).sum())} of {len(rows)} tokenised rows hold no tokens; the first is row "
            f"{int(np.argmin(lengths != 0))}. Remove them."
        )
    for name in PER_TOKEN:
        if name in rows.column_names:
            entries: Any = rows.select_columns([name]).rename_column(name, "input_ids")
            own = row_lengths(entries)
            if (wrong := np.flatnonzero(own != lengths)).size:
                i = int(wrong[0])
                raise ValueError(
                    f"{who}: row {i} has {lengths[i]} tokens in 'input_ids' and {own[i]} in {name!r}. Both must have one "
                    f"entry for each token."
                )


def says_completion(rows: Dataset, task_row: dict[str, Any], asked: bool | None, who: str) -> bool:
    """Whether the `completion_mask` of tokenised rows decides which tokens are trained.

    SFTTrainer uses the mask only under `completion_only_loss=True`; left alone, that follows the task's rows,
    which say nothing about these rows.

    Args:
        rows: Tokenised rows.
        task_row: A raw row of the task.
        asked: `completion_only_loss` of the training arguments; False trains prompts deliberately.
        who: Name of the method, for the log.

    Returns:
        Whether to use the mask.
    """
    names = rows.column_names
    if "labels" in names or "completion_mask" not in names or asked is False:
        return False
    if asked is None and "completion_mask" in task_row and "labels" not in task_row:
        logger.warning(
            "%s: its rows are trained where their completion_mask is 1. SFTTrainer ignores the completion_mask of the "
            "task's rows and trains their prompts too, unless completion_only_loss=True is set.", who,
        )  # fmt: skip
    return True


def report_dropped(given: int, kept: int, max_length: int | None, who: str) -> None:
    """Raise an error if no rows are left, and log how many were dropped.

    Args:
        given: Number of rows.
        kept: Number of rows left.
        max_length: Length to which they were truncated.
        who: Name of the method.

    Raises:
        ValueError: If no rows are left.
    """
    if not kept:
        raise ValueError(
            f"{who}: none of the {given} rows has a trainable token left within max_length={max_length}. Raise "
            f"max_length, or give shorter rows."
        )
    if kept < given:
        logger.warning(
            "%s: %d of %d rows have no trainable token left within max_length=%s and are dropped.",
            who, given - kept, given, max_length,
        )  # fmt: skip
