"""The tables and sentences of a card, each from facts alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_continual.hub.facts import CardFacts, Evaluation, GaugeFacts, TaskFacts
from hf_continual.hub.text import safe

MEANINGS = {
    "op": ("OP", "mean score over all tasks after the last one", True),
    "bwt": ("BWT", "mean change of the earlier tasks since each was learned; below 0 is forgetting", True),
    "fwt": ("FWT", "mean score on a task before it is learned, against the base model", True),
    "forgetting": ("Forgetting", "mean drop of the earlier tasks from each one's best", False),
}


def number(value: float | None) -> str:
    """A score as printed everywhere on a card."""
    return "-" if value is None else f"{value:.4f}"


def signed(value: float | None) -> str:
    """A change as printed on a card."""
    return "-" if value is None else f"{value:+.4f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def moment_names(evaluation: Evaluation) -> list[str]:
    """The name of each row of the matrix."""
    return list(evaluation.row_names or [f"after {task}" for task in evaluation.tasks[: len(evaluation.matrix)]])


def matrix_table(evaluation: Evaluation) -> str:
    """The accuracy matrix with its base row; a cell without a number states why."""
    width = len(evaluation.tasks)
    rows = [["base model", *(_cell(evaluation, "base", t, v) for t, v in _padded(evaluation, evaluation.base_row))]]
    rows = rows if evaluation.base_row is not None else []
    for name, row in zip(moment_names(evaluation), evaluation.matrix, strict=True):
        moment = name.removeprefix("after ")
        rows.append([name, *(_cell(evaluation, moment, t, v) for t, v in _padded(evaluation, row))])
    assert all(len(row) == width + 1 for row in rows)
    return table(["model", *evaluation.tasks], rows)


def _padded(evaluation: Evaluation, row: Sequence[float | None] | None) -> list[tuple[str, float | None]]:
    row = list(row or [])
    return list(zip(evaluation.tasks, [*row, *[None] * (len(evaluation.tasks) - len(row))], strict=True))


def _cell(evaluation: Evaluation, moment: str, task: str, value: float | None) -> str:
    status = evaluation.status.get(f"{moment}/{task}")
    if value is None:
        return status if status in ("ERROR", "NOT_RUN") else "-"
    return number(value)


def protocol(evaluation: Evaluation) -> str:
    """One line on how the tasks were scored."""
    parts = [
        f"Metric: {evaluation.metric or 'not stated'}, {'lower' if evaluation.lower_is_better else 'higher'} is better."
    ]
    if evaluation.rows:
        counts = sorted(set(evaluation.rows.values()))
        if len(counts) == 1 and set(evaluation.rows) >= set(evaluation.tasks):
            parts.append(f"{counts[0]:,} rows per task.")
        else:
            parts.append("Rows: " + ", ".join(f"{t} {n:,}" for t, n in evaluation.rows.items()) + ".")
    row = "Rows of the table are models" if evaluation.row_names else "Row i is the model after learning task i"
    parts.append(
        f'{row}, a column is the task it was scored on; "-": no score was requested, NOT_RUN: not scored, ERROR: scoring failed.'
    )
    return " ".join(parts)


def statuses(evaluation: Evaluation) -> str:
    """Evaluations that failed, by name."""
    words = [
        f"{place.replace('/', ' on ')}: {status}"
        for place, status in sorted(evaluation.status.items())
        if status == "ERROR"
    ]
    return f"Evaluations that failed: {'; '.join(words)}." if words else ""


def figures_table(evaluation: Evaluation) -> str:
    """OP, BWT, FWT and forgetting with their meaning; those that cannot be computed are NOT_RUN."""
    rows = []
    for name, value in evaluation.figures.items():
        short, meaning, higher = MEANINGS[name]
        better = higher if name != "op" else not evaluation.lower_is_better
        interval = evaluation.intervals.get(name)
        shown = "NOT_RUN" if value is None else number(value)
        rows.append([
            short, shown, f"{number(interval[0])} to {number(interval[1])}" if interval and value is not None else "-",
            f"{meaning} ({'higher' if better else 'lower'} is better)",
        ])  # fmt: skip
    return table(["metric", "value", "95 % interval", "meaning"], rows)


def gauges_table(evaluation: Evaluation) -> str:
    """General abilities outside the tasks, before and after."""
    rows = []
    for g in evaluation.gauges:
        name = (
            f"{g.name} ({g.protocol}, {'lower' if g.lower_is_better else 'higher'} is better)" if g.protocol else g.name
        )
        if g.status != "MEASURED":
            rows.append([name, number(g.base), g.status + (f": {g.error}" if g.error else ""), "-"])
            continue
        change = None if g.base is None or g.value is None else g.value - g.base
        rows.append([name, number(g.base), number(g.value), signed(change)])
    return table(["ability", "base", "this model", "change"], rows) if rows else ""


def change_text(gauge: GaugeFacts) -> str:
    """An ability before and after; for a loss in nats also as perplexity, its exponential."""
    text = f"{gauge.name} {number(gauge.base)} to {number(gauge.value)}"
    if gauge.base is None or gauge.value is None:
        return text
    change = gauge.value - gauge.base
    nats = gauge.lower_is_better and ("nll" in gauge.protocol.lower() or "nats" in gauge.protocol.lower())
    times = f", {math.exp(change):,.2f} times its perplexity" if nats and change < 100 else ""
    return f"{text} ({signed(change)}{times})"


def sequence_table(facts: CardFacts) -> str:
    """The tasks, what each was trained from, and where its model is."""
    rows = []
    for i, task in enumerate(facts.tasks):
        this = "this model" if facts.merge is None and i == len(facts.tasks) - 1 else "-"
        start = task.started_from.shown if task.started_from else "-"
        stage = task.checkpoint.shown if task.checkpoint else this
        rows.append(
            [
                str(i + 1),
                task.name,
                dataset_text(task),
                "-" if task.train_rows is None else f"{task.train_rows:,}",
                start,
                stage,
            ]
        )
    return table(["#", "task", "dataset", "training rows", "started from", "model of this stage"], rows)


def dataset_text(task: TaskFacts) -> str:
    """The dataset as a link with its commit; local rows are called local."""
    if not task.dataset:
        return "local rows"
    commit = f" ({task.dataset_revision[:7]})" if task.dataset_revision else ""
    part = f" {task.dataset_config}" if task.dataset_config else ""
    return f"[{task.dataset}](https://huggingface.co/datasets/{task.dataset}){part}{commit}"


def plain(value: Any) -> str:
    """A hyper-parameter as text; long data is described by its size."""
    value = safe(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 100 else f"{type(value).__name__} of {len(value)} entries, see continual_config.json"


def options_text(options: Mapping[str, Any]) -> str:
    """Hyper-parameters in one line."""
    return ", ".join(f"{key}={plain(value)}" for key, value in options.items() if value is not None)
