"""Several arms, orders and seeds of one plan: each a separate run that can be resumed, one table at the end."""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from hf_continual.atomic_files import write_json
from hf_continual.best_plain import best_plain, frontier, verdict_of
from hf_continual.intervals import figure_intervals
from hf_continual.metrics import SUMMARY
from hf_continual.stream.arms import arms_of
from hf_continual.stream.baselines import plain_rate
from hf_continual.stream.check_run import check_run
from hf_continual.stream.compare import compare_arms
from hf_continual.stream.plan import Plan
from hf_continual.stream.plan_lines import Key, Where
from hf_continual.stream.plan_record import keep_plan, plain_plan
from hf_continual.stream.prepare import prepare
from hf_continual.stream.prepared import Prepared
from hf_continual.stream.results import StreamResult, row_scores
from hf_continual.stream.run_plan import check_merge, refuse_on_all, run_prepared
from hf_continual.stream.stored_run import RESULTS
from hf_continual.stream.sweep_cards import add_best_plain
from hf_continual.stream.sweep_files import write_sweep
from hf_continual.stream.trackers import own_run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Args:
        name: Name of its folder.
        arm: Name of its methods, or "".
        order: Name of its order, or "".
        seed: Its seed.
        plan: Its plan.
        where: Places of the plan's entries.
    """

    name: str
    arm: str
    order: str
    seed: int
    plan: Plan
    where: Where

    @property
    def group(self) -> str:
        """What differs besides the seed."""
        return "-".join(part for part in (self.arm, self.order) if part) or "all"


def members(plan: Plan, where: Where) -> list[Member]:
    """The runs of a plan with a sweep.

    Args:
        plan: As read.
        where: Places of its entries.

    Returns:
        Every combination of arms, orders and seeds.

    Raises:
        PlanError: If an order names a task that is not defined, or one twice.
    """
    sweep = plan.sweep
    assert sweep is not None
    orders = sweep.orders if sweep.orders is not None else {"": [t.name for t in plan.tasks]}
    seeds = sweep.seeds if sweep.seeds is not None else [plan.seed]
    for axis, values in (("methods", sweep.methods), ("arms", sweep.arms), ("orders", orders), ("seeds", seeds)):
        if values is not None and not values:
            raise where.error(("sweep", axis), f"the sweep has no {axis}. List some, or leave the key out.")
        for name in values if isinstance(values, Mapping) else ():
            if "/" in name:
                raise where.error(("sweep", axis, name), f"the name {name!r} becomes a folder and must contain no '/'.")
    found = []
    for (arm, changed, its), (order, names), seed in itertools.product(arms_of(plan, where), orders.items(), seeds):
        places = _places(plan, where, order, names)
        name = "-".join(part for part in (arm, order, f"seed{seed}") if part)
        own = {
            "seed": seed,
            "tasks": [changed.tasks[i] for i in places],
            "output_dir": str(Path(plan.output_dir) / name),
        }
        found.append(Member(name, arm, order, seed, changed.model_copy(update=own), _moved(its, places)))
    return found


def _places(plan: Plan, where: Where, order: str, names: Sequence[str]) -> list[int]:
    known = [t.name for t in plan.tasks]
    for i, name in enumerate(names):
        if name not in known or list(names).count(name) > 1:
            what = "is not defined" if name not in known else "is listed twice"
            raise where.error(
                ("sweep", "orders", order, i), f"task {name!r} {what}. The plan's tasks are {', '.join(known)}."
            )
    return [known.index(name) for name in names]


def _moved(where: Where, places: Sequence[int]) -> Where:
    """The same lines for tasks in a different order."""
    lines: dict[tuple[Key, ...], int] = {p: n for p, n in where.lines.items() if p[:1] != ("tasks",) or len(p) == 1}
    for path, line in where.lines.items():
        if path[:1] == ("tasks",) and len(path) > 1 and path[1] in places:
            lines[("tasks", places.index(int(path[1])), *path[2:])] = line
    moved = Where(where.file, lines)
    for path, said in where.overridden.items():
        if path[:1] != ("tasks",) or len(path) == 1:
            moved.overridden[path] = said
        elif path[1] in places:
            moved.overridden["tasks", places.index(int(path[1])), *path[2:]] = said
    return moved


def prepare_sweep(plan: Plan, where: Where, only: str | None = None) -> list[tuple[Member, Prepared]]:
    """Prepare every run of a sweep, so that a mistake in the last is found before the first is trained.

    Args:
        plan: As read.
        where: Places of its entries.
        only: Name of the only run to prepare.

    Returns:
        The runs.

    Raises:
        PlanError: If one cannot be run, or no run has that name.
    """
    everyone = members(plan, where)
    chosen = [m for m in everyone if only in (None, m.name)]
    if not chosen:
        raise where.error(
            ("sweep",), f"there is no run {only!r}; the sweep's are {', '.join(m.name for m in everyone)}."
        )
    return [(member, prepare(member.plan, member.where)) for member in chosen]


def run_sweep(plan: Plan, where: Where, only: str | None = None) -> StreamResult:
    """Run all runs of a sweep, one after the other, and compare them, also as CSV, Markdown and a plot.

    Args:
        plan: As read.
        where: Places of its entries.
        only: Name of the only run to make, so that several processes can share a sweep.

    Returns:
        The results of all runs, and the matrix of the last.
    """
    output_dir = Path(plan.output_dir)
    ready = prepare_sweep(plan, where, only)
    for member, prepared in ready:
        check_merge(member.plan, member.where)
        check_run(prepared)
    whole = prepare(plan.model_copy(update={"sweep": None}), where)
    refuse_on_all(lambda: keep_plan(output_dir, {**plain_plan(whole), "seed": None, "methods": None}))
    results: dict[str, StreamResult] = {}
    for i, (member, prepared) in enumerate(ready):
        logger.info("run %d of %d: %s", i + 1, len(ready), member.name)
        with own_run():
            results[member.name] = run_prepared(prepared, output_dir / member.name, base_dir=output_dir)
    table = compare(members(plan, where), results, dict(ready_rows(ready, output_dir)), plan.evaluation.bootstrap)
    if PartialState().is_main_process and only is None:
        write_json(output_dir / RESULTS, table)
        write_sweep(output_dir, table)
        last_models = [(m.group, output_dir / m.name / list(p.runs)[-1].folder) for m, p in ready]
        add_best_plain(last_models, table)
    last = results[ready[-1][0].name]
    return StreamResult(output_dir, last.matrix, table)


def ready_rows(ready: Sequence[tuple[Member, Prepared]], output_dir: Path) -> list[tuple[str, tuple[int, Any]]]:
    """The scores of all rows of each run, for intervals over rows and seeds."""
    found = []
    for member, prepared in ready:
        rows = row_scores(prepared, output_dir / member.name, output_dir)
        found.append((member.name, (len(prepared.line), rows)))
    return found


def compare(
    everyone: Sequence[Member], results: Mapping[str, StreamResult], rows: Mapping[str, tuple[int, Any]], draws: int
) -> dict[str, Any]:
    """Compare runs, with the mean over seeds for each arm and order.

    Args:
        everyone: The runs of the sweep.
        results: The measurements, by run.
        rows: Number of tasks and row scores, by run.
        draws: Draws of the intervals; 0 omits them.

    Returns:
        ``runs``, ``arms``, ``comparisons`` with the first arm, ``best_plain`` (comparisons with the best plain run, each with
        its verdict) and ``frontier`` (arms that no other beats in learning and retention); a missing run is NOT_RUN.
    """
    runs: dict[str, Any] = {}
    for member in everyone:
        result = results.get(member.name)
        runs[member.name] = {"arm": member.arm, "order": member.order, "seed": member.seed, "status": "NOT_RUN"}
        if result is not None:
            gauges = {name: g["change"] for name, g in result.results["gauges"].items()}
            kept = {k: result.results[k] for k in ("summary", "tasks", "matrix", "nll")}
            runs[member.name] |= {"status": "MEASURED", **kept, "gauge_changes": gauges}
    lower = any(result.matrix.lower_is_better for result in results.values())
    arms = {
        group: _arm([m.name for m in everyone if m.group == group and m.name in results], results, rows, draws)
        for group in dict.fromkeys(m.group for m in everyone if m.name in results)
    }
    for group, arm in arms.items():
        rate = next(plain_rate(m.plan) for m in everyone if m.group == group)
        if rate is not None:
            arm["plain"] = {"learning_rate": rate}
    first, best = _comparisons(everyone, results, rows, arms, lower)
    return {
        "format": 1,
        "lower_is_better": lower,
        "runs": runs,
        "arms": arms,
        "comparisons": first,
        "best_plain": best,
        "frontier": frontier(arms, lower),
    }


def _arm(
    own: Sequence[str], results: Mapping[str, StreamResult], rows: Mapping[str, tuple[int, Any]], draws: int
) -> dict[str, Any]:
    """The means over an arm's runs, which differ in their seed."""
    lower = results[own[0]].matrix.lower_is_better
    tasks = rows[own[0]][0]
    intervals = figure_intervals([rows[n][1] for n in own], tasks, draws, lower_is_better=lower) if draws else {}
    figures = {}
    for name in SUMMARY:
        values = [results[n].results["summary"][name] for n in own]
        if None not in values:
            figures[name] = {
                "mean": statistics.fmean(values),
                "sd": statistics.stdev(values) if len(values) > 1 else None,
                "interval": intervals.get(name),
            }
    arm: dict[str, Any] = {"runs": list(own), "figures": figures}
    for name in results[own[0]].results["gauges"]:
        changes = [results[n].results["gauges"][name]["change"] for n in own]
        if None not in changes:
            arm.setdefault("gauge_changes", {})[name] = statistics.fmean(changes)
    losses = [results[n].results["nll"]["summary"]["overall_performance"] for n in own]
    if None not in losses:
        arm["nll"] = statistics.fmean(losses)
    return arm


def _comparisons(
    everyone: Sequence[Member],
    results: Mapping[str, StreamResult],
    rows: Mapping[str, tuple[int, Any]],
    summaries: Mapping[str, Any],
    lower: bool,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Each arm against the first, and each against the best plain run, order by order."""
    first, best = [], []
    for order in dict.fromkeys(m.order for m in everyone):
        arms: dict[str, dict[int, dict[str, list[float]]]] = {}
        for member in (m for m in everyone if m.order == order and m.name in results):
            tasks, scores = rows[member.name]
            names = results[member.name].results["tasks"]
            last = {name: scores[tasks - 1, j] for j, name in enumerate(names) if (tasks - 1, j) in scores}
            arms.setdefault(member.group, {})[member.seed] = last
        if len(arms) > 1:
            first += compare_arms(list(arms.items()), lower)
            if (plain := best_plain(summaries, list(arms), lower)) is not None:
                others = [(name, scores) for name, scores in arms.items() if name != plain]
                rate = summaries[plain]["plain"]["learning_rate"]
                for test in compare_arms([(plain, arms[plain]), *others], lower):
                    best.append({**test, "learning_rate": rate, "verdict": verdict_of(test)})
    return first, best
