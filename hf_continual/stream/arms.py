"""The arms of a sweep: what each changes in the plan, and where it is written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hf_continual.stream.baselines import PLAN_ARM, plain_arms
from hf_continual.stream.plan import ArmPlan, Plan, SweepPlan
from hf_continual.stream.plan_lines import Key, Where


def arms_of(plan: Plan, where: Where) -> Iterator[tuple[str, Plan, Where]]:
    """Turn every arm of a plan's sweep into a separate plan.

    Args:
        plan: As read; without a sweep it is its only arm.
        where: Places of its entries.

    Yields:
        tuple[str, Plan, Where]: The arm's name, "" if there is one arm; its plan, without a sweep; where its entries are written.
    """
    sweep, alone = plan.sweep or SweepPlan(), plan.model_copy(update={"sweep": None})
    made: dict[str, Plan] = {}
    for name, arm, its in _own_arms(plan, sweep, alone, where):
        made[name] = arm
        yield name, arm, its
    for name, arm in plain_arms(plan, made, where):
        yield name, arm, where


def _own_arms(plan: Plan, sweep: SweepPlan, alone: Plan, where: Where) -> Iterator[tuple[str, Plan, Where]]:
    """The arms that a sweep lists; the plan itself if it lists none."""
    if sweep.methods is None and sweep.arms is None:
        yield "" if sweep.baselines is None else PLAN_ARM, alone, where
    for name, methods in (sweep.methods or {}).items():
        yield (
            name,
            alone.model_copy(update={"methods": methods}),
            _moved(where, ("sweep", "methods", name), ("methods",)),
        )
    for name, arm in (sweep.arms or {}).items():
        yield name, alone.model_copy(update=_changes(plan, arm)), _moved(where, ("sweep", "arms", name), ())


def _changes(plan: Plan, arm: ArmPlan) -> dict[str, Any]:
    """Add options of `sft` and `peft` to the plan's; replace the other keys, and `peft` if it names a kind of adapter."""
    changes = {key: getattr(arm, key) for key in arm.model_fields_set}
    for key in ("sft", "peft"):
        if changes.get(key) and "peft_type" not in changes[key]:  # other kinds of adapters have other options
            changes[key] = {**(getattr(plan, key) or {}), **changes[key]}
    return changes


def _moved(where: Where, written: tuple[Key, ...], stands_for: tuple[Key, ...]) -> Where:
    """The same places, with those under `written` also known by the plan's keys that they represent."""
    moved = Where(where.file, dict(where.lines))
    moved.overridden |= where.overridden
    size = len(written)
    for path, line in where.lines.items():
        if path[:size] == written and stands_for + path[size:]:
            moved.lines[stands_for + path[size:]] = line
    for path, words in where.overridden.items():
        if path[:size] == written and stands_for + path[size:]:
            moved.overridden[stands_for + path[size:]] = words
    return moved
