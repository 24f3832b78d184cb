"""Check the values of rows to learn or to score: text, or messages. Errors name the wrong row."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset, List, Value

from hf_continual.atomic_files import shown

logger = logging.getLogger(__name__)

TEXTUAL = ("text", "prompt", "completion", "messages")


def check_values(
    rows: Dataset, source: str, columns: Sequence[str] = TEXTUAL, places: Sequence[str] | None = None
) -> None:
    """Refuse rows whose columns cannot be learned or scored, before they reach a tokenizer.

    Args:
        rows: The rows.
        source: Where they come from, for messages.
        columns: Columns to check, as far as the rows have them.
        places: Each row's place in its file.

    Raises:
        ValueError: If a value is missing or of the wrong type, or all texts of a column are empty. Names the row and
            its value. A few empty texts are only logged.
    """
    kinds = {}
    for name in columns:
        if name not in rows.column_names:
            continue
        if name == "input_ids":
            _check_ids(rows, source, places)
        elif name in TEXTUAL:
            kinds[name] = _check_text(rows, name, source, places)
    if {"prompt", "completion"} <= kinds.keys() and kinds["prompt"] != kinds["completion"]:
        raise ValueError(
            f"{source}: 'prompt' is {kinds['prompt']} and 'completion' is {kinds['completion']}. Give both as text, or both "
            f"as lists of messages."
        )


def _place(source: str, places: Sequence[str] | None, i: int) -> str:
    return places[i] if places is not None else f"{source}, row {i + 1}"


def _check_text(rows: Dataset, name: str, source: str, places: Sequence[str] | None) -> str:
    """Check a column; returns the kind of its values."""
    kinds: dict[str, int] = {}
    empty = 0
    for i, value in enumerate(_values(rows, name)):
        problem = None
        if isinstance(value, str) and name != "messages":
            kinds.setdefault("text", i)
            empty += not value
        elif isinstance(value, list) and name != "text":
            kinds.setdefault("messages", i)
            problem = _wrong_message(value)
        else:
            wanted = {"messages": "a list of messages", "text": "text"}.get(name, "text or a list of messages")
            problem = f"it must be {wanted}, but is {shown(value)}"
            if isinstance(value, int | float) and not isinstance(value, bool):
                problem += f". Write it in quotes, or map it in a plan: columns: {{{name}: '{{{name}}}'}}"
        if problem:
            raise ValueError(f"{_place(source, places, i)}: {name!r}: {problem}.")
        if len(kinds) > 1:
            raise ValueError(
                f"{_place(source, places, i)}: {name!r} is {shown(value)}, which is not the same kind as in "
                f"{_place(source, places, min(kinds.values()))}. Give all rows one kind, text or messages."
            )
    if empty and empty == len(rows):
        raise ValueError(f"{source}: all {empty} texts in the column {name!r} are empty; there is nothing to read.")
    if empty:
        logger.warning("%s: %d of %d texts in the column %r are empty.", source, empty, len(rows), name)
    return next(iter(kinds), "text")


def _values(rows: Dataset, name: str) -> Iterator[Any]:
    column: Any = rows.select_columns([name])
    for batch in column.iter(batch_size=1000):
        yield from batch[name]


def _wrong_message(messages: list[Any]) -> str | None:
    """What is wrong with a list of messages, or None."""
    if not messages:
        return "the list of messages is empty"
    for i, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            return f'message {i} must be an object such as {{"role": ..., "content": ...}}, and is {shown(message)}'
        if not isinstance(message.get("role"), str):
            return f"message {i} has no role: {shown(message)}"
        content = message.get("content")
        # A tool call has no text; an image is a list of parts.
        others = any(v is not None for k, v in message.items() if k not in ("role", "content"))
        if not isinstance(content, str | list) and not (content is None and others):
            return f"the content of message {i} must be text, and is {shown(content)}"
    return None


def _check_ids(rows: Dataset, source: str, places: Sequence[str] | None) -> None:
    feature = rows.features["input_ids"]
    whole = isinstance(feature, List) and isinstance(feature.feature, Value) and "int" in feature.feature.dtype
    for i, value in enumerate(_values(rows, "input_ids")) if not whole else ():
        if not isinstance(value, list) or not all(isinstance(token, int) for token in value):
            raise ValueError(
                f"{_place(source, places, i)}: 'input_ids' must be a list of token numbers, and is {shown(value)}."
            )
