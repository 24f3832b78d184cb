"""Rows of several tasks as one dataset."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset, Features, Value, concatenate_datasets

# What a chat template is given with a row's messages.
ALONG = ("tools", "chat_template_kwargs")


def join_rows(parts: Sequence[tuple[str, Dataset]], wanted: Sequence[str], advice: str) -> Dataset:
    """Join the rows of several tasks, in their order.

    Readers of different files give the same text different types, and only some rows have tools: both are evened out.

    Args:
        parts: Name and rows of each task; all have the `wanted` columns.
        wanted: The columns that stay, besides what goes with messages (tools, template arguments).
        advice: What to do where rows cannot be joined, after "or".

    Returns:
        The rows with one set of columns.

    Raises:
        ValueError: If the columns hold values of different kinds, or only some tasks have template arguments.
    """
    columns = [*wanted, *(c for c in ALONG if any(c in rows.column_names for _, rows in parts))]
    parts = [(name, _of_columns(rows, columns, name)) for name, rows in parts]
    features = parts[0][1].features
    if all(rows.features.type == features.type for _, rows in parts):
        return concatenate_datasets([rows for _, rows in parts])
    if all(isinstance(kind, Value) for _, rows in parts for kind in rows.features.values()):
        return concatenate_datasets([_cast(rows, name, parts[0][0], features, advice) for name, rows in parts])
    values = {name: [value for _, rows in parts for value in rows[name]] for name in features}
    return Dataset.from_dict(values, on_mixed_types="use_json")


def _cast(rows: Dataset, name: str, first: str, features: Features, advice: str) -> Dataset:
    try:
        return rows if rows.features == features else rows.cast(features)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the rows of the tasks {first!r} and {name!r} have values of different kinds ({features} and "
            f"{rows.features}). Write both in one way, or {advice}."
        ) from error


def _of_columns(rows: Dataset, columns: Sequence[str], name: str) -> Dataset:
    """Rows with these columns; rows without tools are given none."""
    if "chat_template_kwargs" in columns and "chat_template_kwargs" not in rows.column_names:
        raise ValueError(
            f"the rows of task {name!r} have no chat_template_kwargs, but those of another have. Give them to all tasks, or "
            f"to none."
        )
    if "tools" in columns and "tools" not in rows.column_names:
        rows = rows.add_column("tools", [None] * len(rows))  # pyrefly: ignore
    return rows.select_columns(list(columns))  # pyrefly: ignore[bad-return]
