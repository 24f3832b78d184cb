"""Gauges of a plan's tasks: the test rows of earlier tasks, put where a gauge asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, concatenate_datasets

from hf_continual.data.columns import take
from hf_continual.gauges.rules import read_rules, read_weights
from hf_continual.gauges.spec import OPTIONS
from hf_continual.tasks import Task, TaskStream

EARLIER = "earlier_tests"
_RULES = ("stop_if", "rollback_if", "keep_best")
_COLUMNS = ("prompt", "completion", "messages", "text")


def with_earlier_tests(options: Mapping[str, Any], task: Task, stream: TaskStream) -> dict[str, Any]:
    """The training options of a task, with datasets instead of ``earlier_tests``.

    Args:
        options: Options of `ContinualConfig`.
        task: The task that they are for.
        stream: All tasks.

    Returns:
        The options. A gauge without an earlier task, as in the first task, is dropped with its rules.

    Raises:
        ValueError: If rows of earlier tasks are of different kinds.
    """
    gauges = options.get("gauges")
    if not isinstance(gauges, Mapping):
        return dict(options)
    found: dict[str, Any] = {}
    for name, given in gauges.items():
        rows = given.get("rows") if isinstance(given, Mapping) else given
        if name in OPTIONS or rows != EARLIER:
            found[name] = given
        elif (tests := _tests(task, stream, given)) is not None:
            found[name] = {**(given if isinstance(given, Mapping) else {}), "rows": tests}
    gone = set(gauges) - set(found)
    changed = (
        {key: _without(key, options.get(key), gone) for key in _RULES if options.get(key) is not None} if gone else {}
    )
    return {**options, **changed, "gauges": found if set(found) - set(OPTIONS) else False}


def _tests(task: Task, stream: TaskStream, given: Any) -> Dataset | None:
    """Test rows of the earlier tasks, an equal number each, up to the gauge's limit."""
    earlier = [t for t in stream.lineage(task)[:-1] if t.test is not None]
    if not earlier:
        return None
    limit = given.get("limit", 32) if isinstance(given, Mapping) else 32
    kinds = {tuple(c for c in _COLUMNS if c in t.test.column_names) for t in earlier if t.test is not None}
    if len(kinds) > 1:
        raise ValueError(
            f"{EARLIER}: the test rows of {', '.join(t.name for t in earlier)} have different columns ({sorted(kinds)}), so they "
            f"cannot be one gauge. Give the rows of one task by their file."
        )
    (columns,) = kinds
    each = max(limit // len(earlier), 1)
    tests: list[Any] = [t.test for t in earlier]
    return concatenate_datasets([take(rows.select_columns(list(columns)), each) for rows in tests])


def _without(key: str, rules: Any, gone: set[str]) -> Any:
    """The rules on the remaining gauges."""
    if key == "keep_best":
        kept = {g: w for g, w in read_weights("a plan", key, rules).items() if g.partition("/")[0] not in gone}
        return kept or None
    listed = [rules] if isinstance(rules, str | Mapping) else list(rules)
    return [r for r in listed if read_rules("a plan", key, r)[0].gauge.partition("/")[0] not in gone] or None
