"""The report's tables: text to read, numbers to sort by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_continual.best_plain import WORDS
from hf_continual.disk import size
from hf_continual.metrics import SUMMARY
from hf_continual.report.changed import counts_summary
from hf_continual.report.run import Run, short

NAMES = {
    "overall_performance": "overall performance",
    "average_performance": "average over the sequence",
    "learning_accuracy": "right after learning",
    "backward_transfer": "backward transfer",
    "backward_transfer_over_all": "backward transfer, over all tasks",
    "forward_transfer": "forward transfer",
    "forgetting": "forgetting",
}
SIGNED = ("backward_transfer", "backward_transfer_over_all", "forward_transfer")


@dataclass(frozen=True)
class Value:
    """A cell of a table.

    Args:
        text: What is read.
        key: What is sorted by, a number with all its digits; None sorts by the text.
        shade: Share of the scale, 0 to 1, that colours the cell; None: no colour.
        below: Small print under the text, such as an interval.
    """

    text: str
    key: float | None = None
    shade: float | None = None
    below: str = ""


@dataclass(frozen=True)
class Table:
    """A table that can be sorted.

    Args:
        title: Heading.
        head: Names of the columns.
        rows: Cells.
        note: What to know to read it.
        words: Columns from the left that hold text.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Value]]
    note: str = ""
    words: int = 1


def shown(value: Any, lower: bool, signed: bool = False) -> str:
    """A score as it is read: losses with three digits, shares in per cent."""
    if value is None:
        return ""
    if lower:
        return f"{value:+.3f}" if signed else f"{value:.3f}"
    return f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"


def _score(value: Any, lower: bool, signed: bool = False, interval: Any = None) -> Value:
    below = f"{shown(interval[0], lower, signed)} to {shown(interval[1], lower, signed)}" if interval else ""
    return Value(shown(value, lower, signed), value, None, below)


def figure_value(figure: Mapping[str, Any], key: str, lower: bool) -> Value:
    """A figure of an arm with its interval.

    Args:
        figure: ``mean`` and ``interval``.
        key: Its name; those that are not of the matrix are changes of a general benchmark.
        lower: Whether scores are losses.

    Returns:
        The cell.
    """
    own = key in NAMES
    return _score(figure.get("mean"), lower or not own, not own or key in SIGNED, figure.get("interval"))


def matrix_table(run: Run) -> Table:
    """The accuracy matrix with its base row."""
    rows = [*([("base model", run.base)] if run.base is not None else []), *zip(run.tasks, run.scores, strict=False)]
    known = [v for _, row in rows for v in row if v is not None]
    low, high = (min(known, default=0.0), max(known, default=1.0)) if run.lower else (0.0, 1.0)
    cells = []
    for name, row in rows:
        line = [Value(name)]
        for value in [*row, *[None] * (len(run.tasks) - len(row))]:
            share = None if value is None else min(1.0, max(0.0, (value - low) / max(high - low, 1e-12)))
            line.append(Value(shown(value, run.lower), value, 1 - share if share is not None and run.lower else share))
        cells.append(line)
    unit = "losses" if run.lower else "in %"
    return Table(f"{run.name}: numbers", ["after learning", *run.tasks], cells, f"{run.metric or 'score'}, {unit}")


def summary_table(runs: Sequence[Run]) -> Table:
    """The figures of every run with their 95 % intervals."""
    keys = [name for name in SUMMARY if any(run.summary.get(name) is not None for run in runs)]
    losses = any((run.losses.get("summary") or {}).get("overall_performance") is not None for run in runs)
    gauges = list(dict.fromkeys(name for run in runs for name in run.gauges))[:6]
    grouped = any(run.group != run.name for run in runs)
    head = [
        "run",
        *["arm"] * grouped,
        "tasks",
        *(NAMES[key] for key in keys),
        *["answers' loss"] * losses,
        *(f"{short(g, 40).strip()}, change" for g in gauges),
    ]
    rows = []
    for run in runs:
        line = [Value(run.name), *[Value(run.group)] * grouped, Value(str(len(run.scores)), len(run.scores))]
        line += [_score(run.summary.get(key), run.lower, key in SIGNED, run.intervals.get(key)) for key in keys]
        if losses:
            line.append(_score((run.losses.get("summary") or {}).get("overall_performance"), True))
        line += [_score((run.gauges.get(g) or {}).get("change"), True, signed=True) for g in gauges]
        rows.append(line)
    unit = "Scores in %" if not any(run.lower for run in runs) else "Losses as they are, other scores in %"
    note = (
        f"{unit}; below them 95 % intervals over the scored rows. Answers' loss: nats per token, all tasks at the end."
    )
    return Table("Every run", head, rows, note, words=1 + grouped)


def arms_table(arms: Mapping[str, Mapping[str, Any]], lower: bool) -> Table:
    """The arms with their intervals."""
    keys = list(dict.fromkeys(name for arm in arms.values() for name in arm["figures"]))
    rows = []
    for name, arm in arms.items():
        line = [Value(name), Value(str(len(arm["runs"])), len(arm["runs"]))]
        line += [figure_value(arm["figures"].get(key) or {}, key, lower) for key in keys]
        rows.append(line)
    head = ["arm", "runs", *(NAMES.get(key, f"{short(key, 40).strip()}, change") for key in keys)]
    return Table(
        "Arms",
        head,
        rows,
        "Means over the runs of an arm, with 95 % intervals over rows, and over seeds if an arm has more than one.",
    )


def tests_table(
    tests: Sequence[Mapping[str, Any]], lower: bool, title: str = "Is the difference more than chance?"
) -> Table:
    """Paired tests on the same rows."""
    rows = []
    for test in tests:
        p = test["p_value"]
        rows.append([
            Value(test["second"]), Value(test["first"]), Value("all tasks" if test["task"] == "overall" else test["task"]),
            _score(test["difference"], lower, True, test["interval"]), Value("< 0.001" if p < 0.001 else f"{p:.3f}", p),
            Value(f"{test['better']:,}", test["better"]), Value(f"{test['worse']:,}", test["worse"]), Value(f"{test['n']:,}", test["n"]),
        ])  # fmt: skip
    names = "; ".join(dict.fromkeys(test["test"] for test in tests))
    head = ["run", "against", "rows of", "gain", "p", "rows better", "rows worse", "rows"]
    note = f"After the last task, on the same rows; above 0: the run is better. p: {names}. It is about other rows, not about other seeds."
    return Table(title, head, rows, note, words=3)


def plain_table(tests: Sequence[Mapping[str, Any]], lower: bool) -> Table:
    """Every run against the best plain run, with what that says."""
    rows = []
    for test in tests:
        rate, p = test.get("learning_rate"), test["p_value"]
        rows.append([
            Value(test["second"]), Value(test["first"]), Value("" if rate is None else f"{rate:.3g}", rate),
            _score(test["difference"], lower, True, test["interval"]), Value("< 0.001" if p < 0.001 else f"{p:.3f}", p),
            Value(WORDS[test["verdict"]]),
        ])  # fmt: skip
    head = ["run", "best plain run", "its learning rate", "gain", "p", "verdict"]
    note = (
        "The best plain run is the one with the best overall performance, whatever its learning rate. Within: the interval of the "
        "difference holds 0, so the gain is within what a learning rate gives."
    )
    return Table("Against the best plain run", head, rows, note, words=2)


def events_table(runs: Sequence[Run]) -> Table | None:
    """What rules did during training; None where they did nothing."""
    rows = [
        [
            Value(run.name),
            Value(e.task),
            Value(e.kind.replace("_", " ")),
            Value(e.rule),
            Value(e.reason),
            Value(f"{e.step:.0f}", e.step),
        ]
        for run in runs
        for e in run.timeline.events
    ]
    return (
        Table("What rules did", ["run", "task", "event", "rule", "reason", "step of the task"], rows, words=5)
        if rows
        else None
    )


def changes_table(runs: Sequence[Run], by_task: bool = False) -> Table:
    """How many rows changed, by run, or by run and task."""
    rows = []
    for run in runs:
        for task, count in (run.changes.counts if by_task else {"": counts_summary(run.changes)}).items():
            numbers = [count[k] for k in ("rows", "kept", "lost", "regained", "never")]
            rows.append([Value(run.name), *[Value(task)] * by_task, *(Value(f"{n:,}", n) for n in numbers)])
    head = [
        "run",
        *["task"] * by_task,
        "rows",
        "right and kept",
        "right, then wrong",
        "wrong, then right again",
        "never right",
    ]
    title = "Task by task" if by_task else "How many answers changed"
    return Table(title, head, rows, "From the first stage at which a row was scored to the last.", words=1 + by_task)


def cost_table(runs: Sequence[Run]) -> Table | None:
    """Steps, time, tokens and memory of each task; None if nothing is known."""
    keys = {"steps": "steps", "seconds": "training, seconds", "tokens": "tokens", "memory_bytes": "peak memory"}
    entries = [(run, entry) for run in runs for entry in run.cost if any(entry[key] is not None for key in keys)]
    known = [key for key in keys if any(entry[key] is not None for _, entry in entries)]
    if not entries:
        return None
    devices = any(entry["device"] for _, entry in entries)
    rows = []
    for run, entry in entries:
        line = [Value(run.name), Value(entry["task"])]
        for key in known:
            value = entry[key]
            text = (
                ""
                if value is None
                else size(int(value))
                if key == "memory_bytes"
                else f"{value:,.1f}"
                if key == "seconds"
                else f"{value:,.0f}"
            )
            line.append(Value(text, value))
        rows.append([*line, *[Value(str(entry["device"] or ""))] * devices])
    return Table(
        "What each task took", ["run", "task", *(keys[key] for key in known), *["device"] * devices], rows, words=2
    )


def flat(data: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Settings by their path: ``sft.learning_rate``. Lists of plain values stay together."""
    if isinstance(data, Mapping) and data:
        for key, value in data.items():
            yield from flat(value, f"{name}.{key}" if name else str(key))
    elif isinstance(data, list) and any(isinstance(value, Mapping | list) for value in data):
        for i, value in enumerate(data):
            named = value.get("name") if isinstance(value, Mapping) else None
            yield from flat(value, f"{name}.{named if isinstance(named, str) else i}")
    elif data is not None and data != {} and data != []:
        yield name, ", ".join(map(str, data)) if isinstance(data, list) else str(data)


def settings_table(runs: Sequence[Run], most: int = 80) -> Table | None:
    """Settings in which the runs differ; of one run all but hashes. None where no run has any."""
    each = [dict(flat(run.config)) for run in runs]
    keys = [
        k
        for k in dict.fromkeys(k for one in each for k in one)
        if not k.endswith((".sha256", ".vocabulary")) and ".files." not in k
    ]
    if not keys:
        return None
    several = len(runs) > 1
    differing = [k for k in keys if len({one.get(k) for one in each}) > 1] if several else keys
    rows = [[Value(k), *(Value(_cut(one.get(k, ""))) for one in each)] for k in differing[:most]]
    note = f"The first {most} of {len(differing)}; all are below." if len(differing) > most else ""
    if several and not rows:
        note = "The runs do not differ in any setting that was recorded."
    title = "Settings in which the runs differ" if several else "Settings"
    return Table(title, ["setting", *(run.name for run in runs)], rows, note, words=1 + len(runs))


def _cut(text: str, most: int = 160) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
