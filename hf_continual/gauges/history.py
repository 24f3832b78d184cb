"""What a run's gauges have measured so far, and what rules did: for rules, checkpoints and the file that reports read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from hf_continual.gauges.values import Value
from hf_continual.methods.base import State


@dataclass
class History:
    """Measurements and events of a run.

    Args:
        points: Values at each measurement, by ``gauge/measure``.
        steps: Optimizer step of each.
        events: Actions of the rules: step, event, rule and reason.
    """

    points: list[dict[str, Value]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def add(self, step: int, point: dict[str, Value]) -> None:
        """Append a measurement."""
        self.points.append(point)
        self.steps.append(step)

    def lines(self, task: str) -> list[dict[str, Any]]:
        """Everything as lines of the file of gauges.

        Args:
            task: Name of the task.

        Returns:
            A line per value: step, task, gauge, value and its standard error se; then a line per event.
        """
        values = [
            {"step": step, "task": task, "gauge": gauge, "value": value.value, "se": value.se}
            for step, point in zip(self.steps, self.points, strict=True)
            for gauge, value in point.items()
        ]
        return [*values, *({**event, "task": task} for event in self.events)]

    def state(self) -> State:
        """For a checkpoint; a value that one point lacks (another method joined later) is None there."""
        names = list(dict.fromkeys(name for point in self.points for name in point))
        table = [[None if (v := p.get(n)) is None else [v.value, v.se] for n in names] for p in self.points]
        return {"names": names, "points": table, "steps": list(self.steps), "events": list(self.events)}

    def load(self, state: State, measures: Collection[str]) -> bool:
        """Take over the state of a checkpoint, unless its gauges measured other things.

        Args:
            state: What `state` returned.
            measures: ``gauge/measure`` of the gauges now. Measures that methods add of themselves may differ.

        Returns:
            Whether it was taken over.
        """
        names = state.get("names") or []
        if names and set(measures) - set(names):
            return False
        self.points = [
            {n: Value(*v) for n, v in zip(names, row, strict=True) if v is not None} for row in state["points"]
        ]
        self.steps, self.events = list(state["steps"]), list(state["events"])
        return True
