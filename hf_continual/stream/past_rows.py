"""Rows of earlier tasks, put where a method asks for them: all, or those in the plan's buffer (key `memory`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset, Features, Value, concatenate_datasets

from hf_continual.data.buffer import ORIGIN, Memory
from hf_continual.data.columns import take
from hf_continual.methods.table import method_class
from hf_continual.stream.plan import MemoryPlan, Plan
from hf_continual.stream.plan_lines import Key, Where
from hf_continual.tasks import Task, TaskStream

EARLIER, KEPT = "earlier_tasks", "kept"

# Columns of the types of rows that can be learned, as TRL looks for them.
TRAINABLE = (("prompt", "completion"), ("messages",), ("conversations",), ("text",), ("input_ids", "labels"))
_NAMES = ("prompt_completion", "messages", "conversations", "text", "tokenized")
KINDS = dict(zip(_NAMES, TRAINABLE, strict=True))
# Columns that a chat template gets with a row's messages.
ALONG = ("tools", "chat_template_kwargs")


class KeptRows:
    """The rows in the buffer after each task of a sequence, chosen before anything is trained.

    Each row keeps the columns for training and its class, and its origin is added.

    Args:
        memory: The rule.
        stream: The tasks.
        sources: Where each task's rows were read from, by its name.

    Raises:
        ValueError: If the classes cannot be read, or a row cannot be written as JSON.
    """

    def __init__(self, memory: Memory, stream: TaskStream, sources: Mapping[str, str]) -> None:
        self.stream, self.start = stream, [dict(row) for row in memory.start]
        wanted = {memory.by, *ALONG, *(column for kind in TRAINABLE for column in kind)}
        tasks: list[Task] = []
        for task in stream:
            rows: Any = task.train
            tasks.append(replace(task, train=rows.select_columns([c for c in rows.column_names if c in wanted])))
        lines = {t.name: [tasks[earlier.index] for earlier in stream.lineage(t)] for t in stream}
        self.after = {name: memory.records(line, sources) for name, line in lines.items()}
        try:
            json.dumps(self.after)
        except TypeError as error:
            raise ValueError(f"rows of the memory cannot be written as JSON: {error}. Map their columns.") from error

    def given(self, task: Task) -> list[dict[str, Any]]:
        """The rows that a task is given: those kept after the task that it continues from, or the start."""
        parent = self.stream.parent(task)
        return self.start if parent is None else self.after[parent.name]


def row_options(name: str, options: Any) -> tuple[str, ...]:
    """Options of a method, described as data, that name rows; empty if the description is invalid."""
    if not isinstance(options, Mapping):
        return ()
    try:
        return method_class(name).row_sources()
    except ValueError:
        return ()  # reported where the methods are built


def with_earlier(description: Any, task: Task, stream: TaskStream, memory: KeptRows | None) -> Any:
    """Put the rows of earlier tasks where a method asks for them; if there are none, leave the method out.

    Args:
        description: The methods as plain data.
        task: The task that they are for.
        stream: All tasks.
        memory: Their kept rows, if any.

    Returns:
        The methods with datasets instead of ``earlier_tasks`` and ``kept``.

    Raises:
        ValueError: If the rows are of another type than the task's.
    """
    if isinstance(description, Sequence) and not isinstance(description, str):
        return [with_earlier(item, task, stream, memory) for item in description]
    if not isinstance(description, Mapping):
        return description
    found = {}
    for name, options in description.items():
        there = True
        for option in row_options(name, options):
            if (asked := _asked(option, options.get(option))) is not None:
                rows = _rows(option, task, stream, memory, options.get("row_type"), **asked)
                options, there = {**options, option: rows}, there and rows is not None
        if there:
            found[name] = options
    return found


def _asked(option: str, value: Any) -> dict[str, Any] | None:
    """An option's request for rows of earlier tasks; None if it has none."""
    if isinstance(value, str) and value in (EARLIER, KEPT):
        return {"word": value}
    if not isinstance(value, Mapping) or (word := next((w for w in (EARLIER, KEPT) if w in value), None)) is None:
        return None
    if unknown := set(value) - {word, "of", "seed"}:
        raise ValueError(f"{option}: {{{word}: NUMBER, of: [names]}} has no key {sorted(unknown)[0]!r}.")
    return {"word": word, "number": value[word], "of": value.get("of"), "seed": value.get("seed", 0)}


def _rows(
    option: str,
    task: Task,
    stream: TaskStream,
    memory: KeptRows | None,
    row_type: str | None,
    word: str,
    number: int | None = None,
    of: Sequence[str] | None = None,
    seed: int = 0,
) -> Dataset | None:
    """Rows of the tasks that this task's model has learned, at most `number` of each; None if there are none."""
    parts = _kept(memory.given(task)) if memory and word == KEPT else _earlier(task, stream)
    known = {name for name, _ in parts} | {t.name for t in stream}
    if of is not None and (unknown := sorted(set(of) - known)):
        raise ValueError(
            f"{option}: of lists the task {unknown[0]!r}, which does not exist. Known are {sorted(known)}."
        )
    parts = [(name, take(rows, number, seed)) for name, rows in parts if of is None or name in of]
    if not parts or task.train is None:
        return None
    own = next((kind for kind in TRAINABLE if set(kind) <= set(task.train.column_names)), ())
    wanted = KINDS.get(row_type or "same", own)
    for name, found in parts:
        if not set(wanted) <= set(found.column_names):
            raise ValueError(
                f"the rows of the earlier task {name!r} have the columns {found.column_names} and task {task.name!r} "
                f"replays {list(wanted)}. List the tasks to replay, {option}: {{{word}: NUMBER, of: [...]}}, or the type "
                f"of their rows, row_type: prompt_completion."
            )
    columns = [*wanted, *(c for c in ALONG if any(c in rows.column_names for _, rows in parts))]
    return _joined([(name, _of_columns(rows, columns, name)) for name, rows in parts])


def _joined(parts: Sequence[tuple[str, Dataset]]) -> Dataset:
    """Join rows of several tasks; file readers give the same text different types, and only some rows have tools."""
    features = parts[0][1].features
    if all(rows.features.type == features.type for _, rows in parts):
        return concatenate_datasets([rows for _, rows in parts])
    if all(isinstance(kind, Value) for _, rows in parts for kind in rows.features.values()):
        return concatenate_datasets([_cast(rows, name, parts[0][0], features) for name, rows in parts])
    columns = {name: [value for _, rows in parts for value in rows[name]] for name in features}
    return Dataset.from_dict(columns, on_mixed_types="use_json")


def _cast(rows: Dataset, name: str, first: str, features: Features) -> Dataset:
    try:
        return rows if rows.features == features else rows.cast(features)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the rows of the earlier tasks {first!r} and {name!r} have values of different kinds ({features} and "
            f"{rows.features}). Write both in the same way, or list the tasks to replay: {{{EARLIER}: NUMBER, of: [...]}}."
        ) from error


def _of_columns(rows: Dataset, columns: Sequence[str], name: str) -> Dataset:
    """Rows with these columns; rows without tools get None."""
    if "chat_template_kwargs" in columns and "chat_template_kwargs" not in rows.column_names:
        raise ValueError(
            f"the rows of the earlier task {name!r} have no chat_template_kwargs, but those of another have. Give them to "
            f"all tasks, or to none."
        )
    if "tools" in columns and "tools" not in rows.column_names:
        rows = rows.add_column("tools", [None] * len(rows))  # pyrefly: ignore
    return rows.select_columns(list(columns))  # pyrefly: ignore[bad-return]


def _earlier(task: Task, stream: TaskStream) -> list[tuple[str, Dataset]]:
    return [(t.name, t.train) for t in stream.lineage(task)[:-1] if t.train is not None]


def _kept(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Dataset]]:
    """Kept rows by their task, without their origin; a task's rows of several types are several parts."""
    parts: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        plain = {column: value for column, value in row.items() if column not in ORIGIN}
        parts.setdefault((row["memory_task"], *plain), []).append(plain)
    return [(key[0], Dataset.from_list(part)) for key, part in parts.items()]


def check_memory(plan: Plan, where: Where) -> None:
    """Refuse methods that ask for rows that the plan's `memory` does not keep, or forbids.

    Args:
        plan: As read.
        where: Places of its entries.

    Raises:
        PlanError: If one does; names the place.
    """
    places: list[tuple[tuple[Key, ...], Any]] = [(("methods",), plan.methods)]
    places += [(("tasks", i, "methods"), task.methods) for i, task in enumerate(plan.tasks)]
    arms = (plan.sweep.methods if plan.sweep else None) or {}
    places += [(("sweep", "methods", arm), methods) for arm, methods in arms.items()]
    trained = [task.train for task in plan.tasks if isinstance(task.train, str)]
    for path, option, value in (asking for place, methods in places for asking in _options(methods, place)):
        words = set(value) if isinstance(value, Mapping) else {value} if isinstance(value, str) else set()
        if plan.memory == "forbidden" and words & {EARLIER, KEPT, *trained}:
            raise where.error(
                path,
                f"the plan says memory: forbidden, and this asks for rows that a task is trained on ({value!r}). Take the "
                f"method out, give it other rows, or let the plan keep rows: memory: {{share: 0.02}}.",
            )
        if KEPT in words and not isinstance(plan.memory, MemoryPlan):
            raise where.error(
                path,
                f"{option}: {KEPT} asks for kept rows, but the plan keeps none. Say which to keep, memory: "
                f"{{share: 0.02}}, or ask for all rows, {option}: {EARLIER}.",
            )


def _options(description: Any, path: tuple[Key, ...]) -> Iterator[tuple[tuple[Key, ...], str, Any]]:
    """Options of methods that may ask for earlier rows, with their places."""
    if isinstance(description, Sequence) and not isinstance(description, str):
        for i, item in enumerate(description):
            yield from _options(item, (*path, i))
    elif isinstance(description, Mapping):
        for name, options in description.items():
            for option in row_options(name, options):
                if option in options:
                    yield (*path, name, option), option, options[option]
