"""A run's measurements, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from hf_continual.metrics import SUMMARY
from hf_continual.stream.plan import ALL_TASKS, JOINT

TITLES = {
    "overall_performance": "overall performance (OP)",
    "average_performance": "average over the sequence",
    "learning_accuracy": "right after learning (LA)",
    "backward_transfer": "backward transfer (BWT)",
    "backward_transfer_over_all": "backward transfer, over all tasks",
    "forward_transfer": "forward transfer (FWT)",
    "forgetting": "forgetting (max - last)",
}


SHORT = {
    "overall_performance": "OP",
    "average_performance": "avg",
    "learning_accuracy": "LA",
    "backward_transfer": "BWT",
    "forward_transfer": "FWT",
    "forgetting": "forgot",
}


FRONTIER = ("learning_accuracy", "backward_transfer", "overall_performance")
PLAIN_NOTE = (
    "The best plain run is the one with the best overall performance, whatever its learning rate. within: the interval holds 0, so "
    "the gain is within what a learning rate gives; better, worse: it does not."
)
FRONTIER_NOTE = "frontier: no other arm both learned (LA) and kept (BWT) more."


@dataclass(frozen=True)
class Blocks:
    """A table that fits the terminal: columns that do not fit go into a further block under the first.

    Args:
        head: Names of the columns; the first column is repeated in every block.
        rows: Cells as text.
        title: Heading.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the blocks, one after the other."""
        first = min(max(len(str(row[0])) for row in [self.head, *self.rows]), max(12, options.max_width // 3))
        widths = [max(len(str(row[i])) for row in [self.head, *self.rows]) for i in range(len(self.head))]
        start, title = 1, self.title
        while start < len(self.head) or start == 1:
            stop, used = start, first + 2
            while stop < len(self.head) and (stop == start or used + widths[stop] + 2 <= options.max_width):
                used, stop = used + widths[stop] + 2, stop + 1
            yield self._block(range(start, stop), first, title)
            start, title = max(stop, start + 1), ""

    def _block(self, columns: Sequence[int], first: int, title: str) -> Table:
        table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column(str(self.head[0]), overflow="fold", width=first)
        for i in columns:
            table.add_column(str(self.head[i]), justify="right", overflow="fold")
        for row in self.rows:
            table.add_row(*(str(row[i]) for i in (0, *columns)))
        return table


MEANINGS = {
    "overall_performance": "mean over all tasks after the last",
    "average_performance": "the same, averaged over the sequence",
    "learning_accuracy": "each task right after it was learned",
    "backward_transfer": "change of earlier tasks since then, below 0 is forgetting",
    "forward_transfer": "tasks before they are learned, against the base model",
    "forgetting": "drop of earlier tasks from their best",
}


def matrix_rows(results: Mapping[str, Any]) -> list[tuple[str, list[float | None]]]:
    """The rows of a run's accuracy matrix with their names; of joint training only the one that exists."""
    scores = results["matrix"]["scores"]
    if results.get("between_tasks") == JOINT:
        return [(ALL_TASKS, row) for row in scores[-1:]]
    return list(zip(results["tasks"], scores, strict=False))


def matrix_table(results: Mapping[str, Any]) -> Blocks:
    """The accuracy matrix with its base row."""
    lower = results["matrix"]["lower_is_better"]
    scale = 1 if lower else 100
    rows = matrix_rows(results)
    if results["matrix"]["base"] is not None:
        rows.insert(0, ("(base model)", results["matrix"]["base"]))
    return Blocks(
        ["after learning", *results["tasks"]],
        [[name, *(_cell(value, scale) for value in row)] for name, row in rows],
        f"{results['metric']}{'' if lower else ', in %'}",
    )


def _cell(value: float | None, scale: float) -> str:
    if value is None:
        return ""
    return f"{scale * value:.1f}" if scale == 100 else f"{value:.3f}"


def summary_table(results: Mapping[str, Any]) -> Table:
    """The figures of a run with their intervals, the answers' losses and the gauges."""
    lower = results["matrix"]["lower_is_better"]
    scale = 1 if lower else 100
    intervals = results["intervals"] or {}
    table = Table(title="retention", title_justify="left")
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("95 % interval over rows", justify="right")
    for name in SUMMARY:
        bounds = intervals.get(name)
        shown = "" if bounds is None else f"{_cell(bounds[0], scale)} to {_cell(bounds[1], scale)}"
        table.add_row(TITLES[name], _cell(results["summary"][name], scale) or "not measured", shown)
    loss = results["nll"]["summary"]["overall_performance"]
    if loss is not None and not lower:
        table.add_row("answers' loss, all tasks (nats per token)", f"{loss:.3f}", "")
    for name, gauge in results["gauges"].items():
        if gauge["change"] is not None:
            table.add_row(f"{name}, change from the base model", f"{gauge['change']:+.3f}", "")
        if gauge.get("harmonic_mean_with_tasks") is not None:
            table.add_row(f"harmonic mean of {name} and tasks", _cell(gauge["harmonic_mean_with_tasks"], 100), "")
    return table


def sweep_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]], list[str]]:
    """The arms of a sweep, side by side.

    Args:
        results: The return value of `hf_continual.stream.sweep.compare`.

    Returns:
        Names of the columns, one line of text per arm, and the figures shown.
    """
    arms = results["arms"]
    scale = 1 if results.get("lower_is_better", False) else 100
    keys = [name for name in SHORT if any(name in arm["figures"] for arm in arms.values())]
    gauges = list(dict.fromkeys(g for arm in arms.values() for g in arm.get("gauge_changes", {})))
    losses = any("nll" in arm for arm in arms.values())
    head = ["arm", "seeds", *(SHORT[k] for k in keys), *["answers' loss"] * losses, *(f"{g}, change" for g in gauges)]
    lines = []
    for group, arm in arms.items():
        loss = [f"{arm['nll']:.2f}" if "nll" in arm else ""] * losses
        changes = [f"{arm['gauge_changes'][g]:+.3f}" if g in arm.get("gauge_changes", {}) else "" for g in gauges]
        figures = [_spread(arm["figures"].get(key), scale) for key in keys]
        lines.append([group, str(len(arm["runs"])), *figures, *loss, *changes])
    return head, lines, keys


def legend(keys: Sequence[str], lower_is_better: bool) -> str:
    """The meaning of the figures' short names, and their unit."""
    names = "; ".join(f"{SHORT[key]}: {MEANINGS[key]}" for key in keys)
    unit = "losses" if lower_is_better else "in %"
    return f"Means over seeds ± standard deviation, {unit}. {names}."


def comparison_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]] | None:
    """Each arm against the first, on the rows that both were scored on.

    Args:
        results: The return value of `hf_continual.stream.sweep.compare`.

    Returns:
        Names of the columns and one line per comparison; None if there are none.
    """
    scale = 1 if results.get("lower_is_better", False) else 100
    lines, base = [], baseline(results)
    for c in results.get("comparisons", ()):
        span = " to ".join(_signed(bound, scale) for bound in c["interval"] or ())
        lines.append([
            c["second"] if base else f"{c['second']} - {c['first']}", _signed(c["difference"], scale), span, p_text(c["p_value"]),
            f"{c['better']}/{c['worse']}", f"{c['n']:,}",
        ])  # fmt: skip
    head = ["arm", "OP, gain", "95 % interval", "p", "rows better/worse", "rows"]
    return (head, lines) if lines else None


def best_plain_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]] | None:
    """Each arm against the best plain run, with what that says.

    Args:
        results: The return value of `hf_continual.stream.sweep.compare`.

    Returns:
        Names of the columns and one line per comparison; None if there is no plain run to compare with.
    """
    scale = 1 if results.get("lower_is_better", False) else 100
    lines = []
    for c in results.get("best_plain", ()):
        span = " to ".join(_signed(bound, scale) for bound in c["interval"] or ())
        plain = f"{c['first']} (rate {c['learning_rate']:.3g})"
        lines.append([c["second"], plain, _signed(c["difference"], scale), span, p_text(c["p_value"]), c["verdict"]])
    return (["arm", "best plain run", "OP, gain", "95 % interval", "p", "verdict"], lines) if lines else None


def frontier_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]] | None:
    """Learning and retention of every arm, the plain ones by their rate first; None with fewer than two plain ones."""
    arms, scale = results["arms"], 1 if results.get("lower_is_better", False) else 100
    rates = {name: arm["plain"]["learning_rate"] for name, arm in arms.items() if arm.get("plain")}
    if len(rates) < 2:
        return None
    order = [*sorted(rates, key=lambda name: -rates[name]), *(name for name in arms if name not in rates)]
    gauges = list(dict.fromkeys(g for arm in arms.values() for g in arm.get("gauge_changes", {})))
    lines = []
    for name in order:
        figures = [_spread(arms[name]["figures"].get(key), scale) for key in FRONTIER]
        changes = [f"{v:+.3f}" if (v := arms[name].get("gauge_changes", {}).get(g)) is not None else "" for g in gauges]
        rate = f"{rates[name]:.3g}" if name in rates else ""
        lines.append([name, rate, *figures, *changes, "yes" if name in results.get("frontier", ()) else ""])
    return [
        "arm",
        "plain, rate",
        *(SHORT[key] for key in FRONTIER),
        *(f"{g}, change" for g in gauges),
        "frontier",
    ], lines


def baseline(results: Mapping[str, Any]) -> str:
    """The arm that all others are compared with; empty if each order of tasks has its own."""
    names = {c["first"] for c in results.get("comparisons", ())}
    return names.pop() if len(names) == 1 else ""


def p_text(value: float) -> str:
    """Format a p-value: two significant digits, down to the smallest that can be resolved."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _signed(value: float, scale: float) -> str:
    return f"{scale * value:+.1f}" if scale == 100 else f"{value:+.3f}"


def _spread(figure: Mapping[str, Any] | None, scale: float) -> str:
    if figure is None:
        return ""
    sd = "" if figure["sd"] is None else f"±{_cell(figure['sd'], scale)}"
    return _cell(figure["mean"], scale) + sd


def sweep_report(results: Mapping[str, Any]) -> RenderableType:
    """A sweep's tables for the terminal."""
    head, lines, keys = sweep_rows(results)
    parts: list[RenderableType] = [Blocks(head, lines), Text(legend(keys, results.get("lower_is_better", False)))]
    if compared := comparison_rows(results):
        tests = dict.fromkeys(c["test"] for c in results["comparisons"])
        parts += [
            Text(""),
            Blocks(*compared, title=f"against {baseline(results) or 'the first arm'}, on the same rows"),
        ]
        parts.append(Text(f"p: {'; '.join(tests)}. It generalises to other rows, not to other seeds."))
    if plain := best_plain_rows(results):
        parts += [Text(""), Blocks(*plain, title="against the best plain run, on the same rows"), Text(PLAIN_NOTE)]
    if fair := frontier_rows(results):
        parts += [Text(""), Blocks(*fair, title="learning against retention"), Text(FRONTIER_NOTE)]
    return Group(*parts)


def results_report(results: Mapping[str, Any]) -> RenderableType:
    """Everything shown at the end of a run or of a sweep."""
    if "arms" not in results:
        return Group(matrix_table(results), summary_table(results))
    waiting = [name for name, run in results["runs"].items() if run["status"] == "NOT_RUN"]
    note = [Text(f"NOT_RUN: {', '.join(waiting)}", style="yellow")] if waiting else []
    return Group(sweep_report(results), *note)
