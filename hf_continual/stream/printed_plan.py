"""One run of a sweep as a separate plan, in YAML."""

from __future__ import annotations

from typing import Any

import yaml

from hf_continual.plain import as_plain
from hf_continual.stream.plan import Plan
from hf_continual.stream.plan_lines import PlanError, Where
from hf_continual.stream.read_plan import check_read


def plan_text(plan: Plan, where: Where, only: str | None = None) -> str:
    """A plan as it was read: benchmarks spelled out, overrides applied, and of a sweep one run.

    Args:
        plan: As read.
        where: Places of its entries.
        only: The run of the sweep; None if there is one run.

    Returns:
        YAML that reads as the same plan.

    Raises:
        PlanError: If the plan has several runs and none is named, or the named one does not exist.
    """
    if plan.sweep is not None:
        from hf_continual.stream.sweep import members

        found = {member.name: member.plan for member in members(plan, where)}
        if only not in found and (only is not None or len(found) > 1):
            asked = "no run is named" if only is None else f"--only {only} is not one of them"
            raise PlanError(f"{asked}; the sweep's runs are {', '.join(found)}. Name one with --only.")
        plan = found.get(only or "", next(iter(found.values())))
    elif only is not None:
        raise PlanError(f"--only {only}: the plan has no sweep, so it is one run. Leave --only out.")
    data = plan.model_dump(exclude_unset=True, exclude={"sweep", "baselines"})
    text = yaml.safe_dump(as_plain(_short(data)), sort_keys=False, allow_unicode=True, width=110)
    check_read(yaml.safe_load(text), Where())
    return text


def _short(data: dict[str, Any]) -> dict[str, Any]:
    """Leave out what says nothing, and write a model that is a path alone as that path."""
    kept = {key: value for key, value in data.items() if value not in (None, {}, [])}
    if set(kept["model"]) == {"path"}:
        kept["model"] = kept["model"]["path"]
    return kept
