"""A sweep as files: one table of runs and one of arms as CSV, all tables as Markdown, and a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_continual.atomic_files import write_text
from hf_continual.metrics import SUMMARY
from hf_continual.plots import plot_arms
from hf_continual.stream.report import (
    FRONTIER_NOTE,
    PLAIN_NOTE,
    baseline,
    best_plain_rows,
    comparison_rows,
    frontier_rows,
    legend,
    sweep_rows,
)

RUNS, ARMS, TABLES, PICTURE = "runs.csv", "arms.csv", "sweep.md", "sweep.png"


def write_sweep(output_dir: Path, results: Mapping[str, Any]) -> None:
    """Write a sweep's tables and its plot.

    Args:
        output_dir: The sweep's folder.
        results: The return value of `hf_continual.stream.sweep.compare`.
    """
    write_text(output_dir / RUNS, as_csv(*runs_table(results)))
    write_text(output_dir / ARMS, as_csv(*arms_table(results)))
    write_text(output_dir / TABLES, as_markdown(results))
    arms = results["arms"]
    if any(arm["figures"] for arm in arms.values()):
        points = {name: [results["runs"][run] for run in arm["runs"]] for name, arm in arms.items()}
        figure = plot_arms(arms, points, results.get("lower_is_better", False))
        figure.savefig(output_dir / PICTURE, dpi=150)


def runs_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """One line per run: its settings, its figures as measured (fractions of 1, or losses), losses and gauges.

    Args:
        results: See `write_sweep`.

    Returns:
        The names of the columns, and the lines; empty where not measured.
    """
    runs = results["runs"]
    gauges = list(dict.fromkeys(g for run in runs.values() for g in run.get("gauge_changes", {})))
    head = ["run", "arm", "order", "seed", "status", *SUMMARY, "answer_nll", *(f"change_{g}" for g in gauges)]
    lines = []
    for name, run in runs.items():
        figures = [run.get("summary", {}).get(figure) for figure in SUMMARY]
        loss = run.get("nll", {}).get("summary", {}).get("overall_performance")
        changes = [run.get("gauge_changes", {}).get(g) for g in gauges]
        lines.append([name, run["arm"], run["order"], run["seed"], run["status"], *figures, loss, *changes])
    return head, lines


def arms_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """One line per arm: mean, standard deviation over seeds and 95 % interval of each figure, losses and gauges.

    Args:
        results: See `write_sweep`.

    Returns:
        The names of the columns, and the lines; empty where not measured.
    """
    arms = results["arms"]
    gauges = list(dict.fromkeys(g for arm in arms.values() for g in arm.get("gauge_changes", {})))
    parts = ("", "_sd", "_low", "_high")
    head = [
        "arm",
        "seeds",
        *(f"{n}{p}" for n in SUMMARY for p in parts),
        "answer_nll",
        *(f"change_{g}" for g in gauges),
        "plain_learning_rate",
        "frontier",
    ]
    lines = []
    for name, arm in arms.items():
        figures: list[Any] = []
        for key in SUMMARY:
            figure = arm["figures"].get(key) or {}
            figures += [figure.get("mean"), figure.get("sd"), *(figure.get("interval") or (None, None))]
        changes = [arm.get("gauge_changes", {}).get(g) for g in gauges]
        rate, best = (arm.get("plain") or {}).get("learning_rate"), int(name in results.get("frontier", ()))
        lines.append([name, len(arm["runs"]), *figures, arm.get("nll"), *changes, rate, best])
    return head, lines


def as_csv(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A table as CSV, numbers with all their digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(["" if value is None else value for value in line] for line in lines)
    return out.getvalue()


def as_markdown(results: Mapping[str, Any]) -> str:
    """The terminal's tables as Markdown, with the plot.

    Args:
        results: See `write_sweep`.

    Returns:
        The text.
    """
    head, lines, keys = sweep_rows(results)
    text = [f"# {sum(r['status'] == 'MEASURED' for r in results['runs'].values())} of {len(results['runs'])} runs", ""]
    text += [_table(head, lines), "", f"{legend(keys, results.get('lower_is_better', False))}", ""]
    if compared := comparison_rows(results):
        text += [f"## Against {baseline(results) or 'the first arm'}, on the same rows", "", _table(*compared), ""]
    if plain := best_plain_rows(results):
        text += ["## Against the best plain run, on the same rows", "", _table(*plain), "", PLAIN_NOTE, ""]
    if fair := frontier_rows(results):
        text += ["## Learning against retention", "", _table(*fair), "", FRONTIER_NOTE, ""]
    text += [f"![Final performance and forgetting of each arm]({PICTURE})", ""]
    text += [f"Every number: [{ARMS}]({ARMS}) (means over seeds), [{RUNS}]({RUNS}) (each run)."]
    return "\n".join(text) + "\n"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    shown = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in shown)
