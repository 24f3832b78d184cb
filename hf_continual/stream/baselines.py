"""Plain fine-tuning at several learning rates as arms of a sweep, so that a method is compared with a tuned baseline.

What looks like a method's gain is often the gain of another learning rate: independent replications of several methods found
plain fine-tuning as good at its best rate. `baselines: {learning_rates: [x, x/3, x/10]}` adds these runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from hf_continual.stream.plan import BaselinesPlan, Plan, SweepPlan
from hf_continual.stream.plan_lines import Key, Where

PLAN_ARM = "plan"  # the plan itself, if it lists no arms
DEFAULT_RATE = 2e-5  # TRL's, for a plan that sets none
_FACTOR = re.compile(r"(?:(?P<times>[0-9.]+)\s*\*?\s*)?x(?:\s*/\s*(?P<over>[0-9.]+))?")


def with_baselines(plan: Plan, where: Where) -> Plan:
    """Move `baselines` of a plan into its sweep, and make one of a plan without.

    Args:
        plan: As read.
        where: Places of its entries.

    Returns:
        The plan; the same if it has no `baselines`.

    Raises:
        PlanError: If they are given twice, or a rate is not one; names the place.
    """
    sweep, own = plan.sweep, plan.baselines
    inner = None if sweep is None else sweep.baselines
    if own is not None and inner is not None:
        raise where.error(("baselines",), "baselines are in the plan and in its sweep. Keep one of the two.")
    asked, path = (own, ()) if own is not None else (inner, ("sweep",))
    if asked is None:
        return plan
    rates_of(plan, asked, where, path)  # refused now, with its place
    sweep = (sweep or SweepPlan()).model_copy(update={"baselines": asked})
    return plan.model_copy(update={"baselines": None, "sweep": sweep})


def rates_of(plan: Plan, asked: BaselinesPlan, where: Where, path: tuple[Key, ...] = ()) -> list[float]:
    """The learning rates of the plain runs.

    Args:
        plan: The plan, for its own rate x, `sft.learning_rate`.
        asked: Numbers, or factors of x as text: ``x``, ``x/3``, ``2x``.
        where: Places of its entries.
        path: Place of `baselines`.

    Returns:
        Rates, in the order given.

    Raises:
        PlanError: If one is not a rate, is given twice, or x is not known.
    """
    found: list[float] = []
    for i, value in enumerate(asked.learning_rates):
        at = (*path, "baselines", "learning_rates", i)
        rate = _rate(value, plan.sft.get("learning_rate"), where, at)
        if rate in found:
            raise where.error(at, f"the learning rate {rate:g} is there twice. Take one out.")
        found.append(rate)
    if not found:
        raise where.error(
            (*path, "baselines", "learning_rates"), "there are no learning rates. Give some, such as [x, x/3, x/10]."
        )
    return found


def _rate(value: float | str, own: Any, where: Where, at: tuple[Key, ...]) -> float:
    try:
        rate = float(value)  # 2e-4 without a point is text to YAML
    except ValueError:
        matched = _FACTOR.fullmatch(str(value).strip())
        try:
            factor = float((matched and matched["times"]) or 1) / float((matched and matched["over"]) or 1)
        except (ValueError, ZeroDivisionError):
            matched, factor = None, 1.0
        if matched is None:
            raise where.error(
                at,
                f"{value!r} is not a learning rate. Give a number, such as 2.0e-4, or a factor of the plan's own rate: x, x/3, 2x.",
            ) from None
        if own is None:
            raise where.error(
                at,
                f"{value!r} is a factor of the plan's learning rate, which it does not set. Say sft: {{learning_rate: 2.0e-4}}, or "
                f"give numbers.",
            ) from None
        rate = float(own) * factor
    if not 0 < rate < float("inf"):
        raise where.error(at, f"the learning rate {value!r} must be above 0 and finite.")
    return rate


def plain_arms(plan: Plan, arms: dict[str, Plan], where: Where) -> Iterator[tuple[str, Plan]]:
    """The plain runs that `baselines` adds to a sweep's arms.

    Args:
        plan: The plan with its sweep.
        arms: The sweep's own arms; a rate that one of them already trains plainly is not trained again.
        where: Places of the plan's entries.

    Yields:
        tuple[str, Plan]: Name of the arm, such as ``plain-6.67e-05``, and its plan, without a sweep.

    Raises:
        PlanError: If an arm has that name already.
    """
    asked = plan.sweep.baselines if plan.sweep else None
    if asked is None:
        return
    for rate in rates_of(plan, asked, where, ("sweep",)):
        made, name = _at_rate(plan, rate), f"plain-{rate:.3g}"
        if any(_same_training(made, arm) for arm in arms.values()):
            continue
        if name in arms:
            raise where.error(
                ("sweep",), f"baselines add an arm {name!r}, which the sweep has already. Rename that one."
            )
        yield name, made


def _at_rate(plan: Plan, rate: float) -> Plan:
    """The plan without methods, buffer and merges, one task after the other, at a learning rate for every task."""
    tasks = [
        task.model_copy(update={"methods": None, "sft": {k: v for k, v in task.sft.items() if k != "learning_rate"}})
        for task in plan.tasks
    ]
    changes = {"methods": None, "memory": None, "between_tasks": "continue", "sweep": None, "baselines": None}
    return plan.model_copy(update={**changes, "tasks": tasks, "sft": {**plan.sft, "learning_rate": rate}})


def _same_training(one: Plan, other: Plan) -> bool:
    """Whether an arm is this plain run under another name."""
    if plain_rate(other) != plain_rate(one) or one.peft != other.peft:
        return False
    rest = [{k: v for k, v in plan.sft.items() if k != "learning_rate"} for plan in (one, other)]
    return rest[0] == rest[1] and [t.sft for t in one.tasks] == [t.sft for t in other.tasks]


def plain_rate(plan: Plan) -> float | None:
    """The learning rate of a plan that fine-tunes plainly, one task after the other.

    Args:
        plan: A plan without a sweep.

    Returns:
        The rate; None if the plan uses a method, a merge, new adapters or joint training.
    """
    if plan.methods or any(task.methods for task in plan.tasks) or plan.between_tasks != "continue":
        return None
    rate = plan.sft.get("learning_rate")
    return DEFAULT_RATE if rate is None else float(rate)
