"""A release gate: may this run's model replace the one before it? `hf-continual gate`, and the same from Python.

Rests on stored predictions alone; loads no weights. What is checked: `hf_continual.stream.gate_limits`. How it is decided:
`hf_continual.stream.gate_check`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_continual.atomic_files import DamagedFile
from hf_continual.intervals import figure_intervals
from hf_continual.metrics import matrix_of
from hf_continual.named import did_you_mean
from hf_continual.stream.gate_check import Check, Measured, Verdict, change, judged, level
from hf_continual.stream.gate_limits import EVERY, Limit, Limits, read_limits
from hf_continual.stream.plan_lines import PlanError
from hf_continual.stream.stored_run import StoredRun, StoredScore, check_same_rows

EXIT_CODES: dict[str, int] = {"pass": 0, "error": 1, "regression": 2, "usage": 3, "insufficient": 4}


@dataclass(frozen=True)
class GateResult:
    """What a gate found.

    Args:
        verdict: regression if a check says so, else insufficient if one says so, else pass.
        reason: Why, in one line.
        checks: Every check.
    """

    verdict: Verdict
    reason: str
    checks: tuple[Check, ...]

    @property
    def exit_code(self) -> int:
        """Of the command: 0 pass, 2 regression, 4 insufficient evidence."""
        return EXIT_CODES[self.verdict]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        checks = [c.to_dict() for c in self.checks]
        return {"verdict": self.verdict, "exit_code": self.exit_code, "reason": self.reason, "checks": checks}


def gate(
    run: str | os.PathLike[str], against: str | os.PathLike[str], margin: float | None = None, alpha: float | None = None,
    power: float | None = None,
) -> GateResult:  # fmt: skip
    """Hold a run against another one, or against thresholds.

    Example:
        >>> gate("out/new", "out/released", margin=0.02).verdict

    Args:
        run: Folder of a finished run.
        against: Folder of a run on the same tasks and rows, or a YAML file of thresholds.
        margin: Against a run: drop of overall performance, and of every task and gauge, that is allowed; by default 0.02
            (2 points of a share, 0.02 nats of a loss).
        alpha: Chance, over all checks, that a run is called worse that is not; by default 0.05.
        power: Chance of passing for which the rows needed are counted; by default 0.8.

    Returns:
        The verdict, with its checks.

    Raises:
        PlanError: If the thresholds or numbers cannot be used.
        FileNotFoundError: If a folder is not that of a run.
        ValueError: If what the limits need was not measured, or the runs were scored on other rows.
    """
    limits = read_limits(against, margin, alpha, power)
    tested = _finished(Path(run))
    baseline = None if limits.baseline is None else _finished(limits.baseline)
    wanted = _every_limit(limits, tested, baseline)
    checks = tuple(judged(x, _measured(x, tested, baseline), len(wanted), limits.alpha, limits.power) for x in wanted)
    return _result(checks)


def _finished(folder: Path) -> StoredRun:
    run = StoredRun(folder)
    if run.complete is False:
        raise ValueError(f"{folder}: the run is not finished. Run its plan again, which resumes it, and ask then.")
    return run


def _every_limit(limits: Limits, run: StoredRun, baseline: StoredRun | None) -> list[Limit]:
    """The limits that are named, those of ``"*"`` for every other name, and the margin for what has no drop named."""
    groups = {"tasks": run.tasks, "gauges": run.gauges}
    named = {key: limit for key, limit in limits.named.items() if not key[0].endswith(f".{EVERY}")}
    explicit = {name for name, _ in named}
    for (name, kind), limit in limits.named.items():
        group, _, own = name.partition(".")
        if own == EVERY:
            for member in (m for m in groups[group] if f"{group}.{m}" not in explicit):
                named[f"{group}.{member}", kind] = Limit(f"{group}.{member}", kind, limit.value, limit.where)
        elif own and own not in groups[group]:
            raise PlanError(
                f"{limit.where}: {run.folder} has no {group[:-1]} {own!r}.{did_you_mean(own, groups[group])} It has "
                f"{', '.join(groups[group]) or 'none'}."
            )
    if baseline is not None and limits.margin is not None:
        for name in _shared(run, baseline):
            named.setdefault((name, "max_drop"), Limit(name, "max_drop", limits.margin))
    return list(named.values())


def _shared(run: StoredRun, baseline: StoredRun) -> Iterator[str]:
    """What the margin is held against: all that the baseline was scored on."""
    missing = [t for t in baseline.tasks if t not in run.tasks] + [g for g in baseline.gauges if g not in run.gauges]
    if missing:
        raise ValueError(
            f"{run.folder} was not scored on {', '.join(missing)}, on which {baseline.folder} was. Score it on the same tasks "
            f"and gauges, or name what to compare in a file of thresholds, without margin."
        )
    if len(baseline.tasks) > 1:
        yield "overall_performance"
    yield from (f"tasks.{task}" for task in baseline.tasks)
    yield from (f"gauges.{gauge}" for gauge in baseline.gauges)


def _measured(limit: Limit, run: StoredRun, baseline: StoredRun | None) -> Measured:
    group, _, own = limit.name.partition(".")
    if limit.kind != "max_drop":
        return level(_last(run, own).values) if own else _figure(limit.name, run)
    if baseline is not None:
        names = [own] if own else [t for t in baseline.tasks if t in run.tasks]
        now, then = ({t: _last(r, t) for t in names} for r in (run, baseline))
        for name in names:
            check_same_rows(name, then[name], now[name], baseline.folder, run.folder)
        since = str(baseline.folder)
    else:
        before = own if group == "tasks" and not run.single else None
        then, now = {own: _known(run.scored(before, own), run, before, own)}, {own: _last(run, own)}
        since = (
            "before training" if run.single else "the base model" if before is None else "right after it was learned"
        )
    return change({t: s.better for t, s in then.items()}, {t: s.better for t, s in now.items()}, since)


def _last(run: StoredRun, name: str) -> StoredScore:
    return _known(run.last(name), run, run.tasks[-1], name)


def _known(score: StoredScore | None, run: StoredRun, after: str | None, name: str) -> StoredScore:
    if score is None:
        which = "the base model" if after is None else f"the model after {after!r}"
        raise DamagedFile(
            f"{run.folder}: {which} has no score of {name!r} that can be believed (not measured, or its predictions were "
            f"changed or removed). Run its plan again, which measures it."
        )
    return score


def _figure(name: str, run: StoredRun) -> Measured:
    """A figure of the accuracy matrix, with its interval over rows."""
    rows = run.matrix_rows()
    lower = all(_last(run, task).lower_is_better for task in run.tasks)
    cells = {place: sum(values) / len(values) for place, values in rows.items()}
    value = matrix_of(cells, len(run.tasks), lower).summary[name]
    if value is None:
        tasks = "evaluation: {tasks: all}" if name == "forward_transfer" else "evaluation: {tasks: seen}"
        raise ValueError(
            f"{run.folder}: {name} was not measured, since cells of the accuracy matrix are missing or there is one task. "
            f"Say {tasks} in its plan and run it again, or take the limit out."
        )
    n = sum(len(rows[len(run.tasks) - 1, j]) for j in range(len(run.tasks)))
    return Measured(
        value, n, lambda c: figure_intervals([rows], len(run.tasks), lower_is_better=lower, confidence=c)[name]
    )


def _result(checks: tuple[Check, ...]) -> GateResult:
    """The worst verdict, with the check that is furthest from passing as the reason."""
    for verdict in ("regression", "insufficient"):
        if not (found := [c for c in checks if c.verdict == verdict]):
            continue
        worst = min(found, key=_slack)
        count = f" ({len(found)} of {len(checks)} checks)" if len(checks) > 1 else ""
        more = f"; about {worst.rows_needed:,} rows would tell" if worst.rows_needed else ""
        words = "regression" if verdict == "regression" else "insufficient evidence"
        return GateResult(verdict, f"{words}{count}: {worst.sentence}{more}", checks)
    nearest = min(checks, key=_slack)
    count = "1 check" if len(checks) == 1 else f"all {len(checks)} checks, the closest"
    return GateResult("pass", f"pass, {count}: {nearest.sentence}", checks)


def _slack(check: Check) -> float:
    """How far the near end of the interval is above the limit."""
    low, high = check.interval or (check.value, check.value)
    if check.kind == "max":
        return check.limit - high
    return low + check.limit if check.kind == "max_drop" else low - check.limit
