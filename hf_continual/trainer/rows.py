"""What kind of rows a dataset holds, and whether two kinds may be mixed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trl.data_utils import is_conversational

if TYPE_CHECKING:
    from hf_continual.data.replay import RowType


def row_type(row: dict[str, Any], text_field: str) -> str:
    """The kind of a raw or tokenised row.

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
    """Refuse replay rows that are not what the run expects.

    Args:
        row: A replay row.
        task_row: A raw row of the task.
        wanted: ``"same"``, or the type that the rows are said to have.
        text_field: Name of the column that holds plain text.
        who: Name of the method, for the message.

    Returns:
        The type of `row`.

    Raises:
        ValueError: If the rows are of another type than the task's, or than was said.
    """
    found, task = row_type(row, text_field), row_type(task_row, text_field)
    if found == "tokenized":
        return found
    if wanted == "same" and found != task:
        raise ValueError(
            f"{who}: the replay rows are {found} and the task's rows are {task}. Mixed unawares, one of the two "
            f"would be trained on the wrong tokens. Convert the rows to {task}, tokenise them to input_ids and "
            f"labels, or say that it is meant with row_type={found.split()[0]!r}."
        )
    if wanted != "same" and found.split()[0] != wanted:
        raise ValueError(f"{who}: row_type={wanted!r} was given, but the rows are {found} (columns {sorted(row)}).")
    return found
