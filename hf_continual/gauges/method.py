"""Gauges: a method that only watches. It measures and may end the run; training itself is the same without it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_continual.atomic_files import write_lines
from hf_continual.bounds import whole_number
from hf_continual.ends import padding_token
from hf_continual.gauges.history import History
from hf_continual.gauges.measure import Base, measured, record
from hf_continual.gauges.probe import ProbeRow, are_texts, batches, probe_rows
from hf_continual.gauges.rules import Rule, Saturated
from hf_continual.gauges.spec import Gauge
from hf_continual.gauges.values import Value, values_of
from hf_continual.methods.base import Method, Run, State
from hf_continual.tensors.reference import as_reference

logger = logging.getLogger(__name__)

FILE = Path("continual") / "gauges.jsonl"
_IN_FILE = ("loss_ratio", "exact_change")


@dataclass
class Gauges(Method):
    """Measure retention during training, stop before harm is done, and keep the best weights.

    Each gauge is a handful of rows, for which one forward pass gives loss, exact match and, optionally, the forward KL
    from the base model. It is measured before the first step, every `every` steps and after the last; between these
    nothing is computed. Logits exist for at most 512 predicted tokens at a time. The base is the model without its
    adapters or, if all weights are trained, the model that training starts from; its hidden states before predicted
    tokens are kept (rows x tokens x hidden size, on the CPU), and a copy of the head if that is trained. `rollback_if`
    and `keep_best` keep a copy of the trained weights on the CPU, and in checkpoints.

    Args:
        gauges: By name; see `hf_continual.gauges.spec.read_gauges`.
        every: Optimizer steps between two measurements; None: a tenth of the run, at least 10.
        batch_size: Rows of a forward pass.
        stop_if: Rules; when one holds, training ends after the step.
        rollback_if: Rules; when one holds, training ends with the weights of the last measurement that passed them all.
        keep_best: Weights of the measures in the sum to minimise; the run ends with the model weights that had the
            smallest sum.
        saturated: Ends training once the new task is learned.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If a rule names a gauge or a measure that does not exist.
    """

    gauges: Mapping[str, Gauge]
    every: int | None = None
    batch_size: int = 8
    stop_if: tuple[Rule, ...] = ()
    rollback_if: tuple[Rule, ...] = ()
    keep_best: Mapping[str, float] = field(default_factory=dict)
    saturated: Saturated | None = None

    name: ClassVar[str] = "gauge"
    watches: ClassVar[bool] = True

    _rows: dict[str, list[ProbeRow]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _base: dict[str, Base] = field(default_factory=dict, init=False, repr=False, compare=False)
    _start: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)
    _history: History = field(default_factory=History, init=False, repr=False, compare=False)
    _kept: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _kept_at: int | None = field(default=None, init=False, repr=False, compare=False)
    _smallest: float | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        whole_number("gauges", "batch_size", self.batch_size)
        if self.every is not None:
            whole_number("gauges", "every", self.every, unit="optimizer steps")
        if self.rollback_if and self.keep_best:
            raise ValueError(
                "rollback_if and keep_best both choose the final weights. Keep one; a rule in stop_if ends a run too."
            )
        asked = [("stop_if", r.gauge) for r in self.stop_if] + [("rollback_if", r.gauge) for r in self.rollback_if]
        asked += [("keep_best", g) for g in self.keep_best]
        asked += [("stop_when", self.saturated.gauge)] if self.saturated else []
        for key, gauge in asked:
            if gauge not in self._measures:
                raise ValueError(
                    f"{key} names {gauge!r}, which is not measured. Measured are {', '.join(self._measures) or 'none'}."
                )

    def describe(self) -> dict[str, Any]:
        """Empty: gauges change no weights, and another attempt may measure something else."""
        return {}

    @property
    def events(self) -> tuple[dict[str, Any], ...]:
        """Actions of the rules: step, event, rule and reason."""
        return tuple(self._history.events)

    def prepare(self, run: Run) -> None:
        """Tokenise the rows, and measure the model that training starts from."""
        if run.is_sharded and (self._weights_are_kept or any(g.kl for g in self.gauges.values())):
            raise ValueError(
                "The weights are sharded over processes (FSDP, ZeRO), and gauges with kl, rollback_if and keep_best need them whole. "
                "Drop these options, or train with DDP."
            )
        for name, gauge in self.gauges.items():
            if gauge.source is None:
                self._open(run, name, gauge)

    def _open(self, run: Run, name: str, gauge: Gauge) -> None:
        rows: Any = gauge.rows(run)
        if "input_ids" not in rows.column_names:
            rows = rows.select(range(min(gauge.limit, len(rows))))
        self._rows[name] = probe_rows(rows, run.tokenizer, gauge.max_length, name)
        if gauge.kl:
            self._base[name] = Base(run.model)
            with run.autocast():
                for batch in self._batches(run, name):
                    record(
                        run.model, self._rows[name], batch, self._base[name], run.device, padding_token(run.tokenizer)
                    )
        if name not in self._start:
            if run.step > 0:
                logger.warning(
                    "The gauge %r was not measured before the first step: its changes are those since step %d.",
                    name,
                    run.step,
                )
            self._start[name] = self._measured(run, name)

    def begin_task(self, run: Run) -> None:
        """Measure once before the first step; rows that other methods add exist now."""
        for name, gauge in self.gauges.items():
            if gauge.source is not None:
                self._open(run, name, gauge)
        self._due = self.every or max(10, run.max_steps // 10)
        if run.step == 0:
            self._note(run)
            self._keep_if_good(run)

    def end_step(self, run: Run) -> None:
        """Measure if it is due, and act on it."""
        last = run.step >= run.max_steps
        if run.step % self._due == 0 or last:
            self._note(run)
            self._act(run)
        if last:
            self._go_back_to_best(run)

    @property
    def _measures(self) -> list[str]:
        return [f"{name}/{measure}" for name, gauge in self.gauges.items() for measure in gauge.measures]

    @property
    def _weights_are_kept(self) -> bool:
        return bool(self.rollback_if or self.keep_best)

    def _batches(self, run: Run, name: str) -> list[list[int]]:
        rows = self._rows[name]
        # Sharded weights are gathered by all processes together, so all must make the same passes.
        world, rank = (1, 0) if run.is_sharded else run.place
        return list(batches(rows, range(rank, len(rows), world), self.batch_size))

    def _measured(self, run: Run, name: str) -> np.ndarray:
        """Each row's current values, the same on all processes; shape (R, 4)."""
        found = torch.zeros(len(self._rows[name]), 4, dtype=torch.float64, device=run.device)
        pad, base = padding_token(run.tokenizer), self._base.get(name)
        with as_reference(run.model, "task_start"), run.autocast():
            for batch in self._batches(run, name):
                found[batch] = measured(run.model, self._rows[name], batch, base, run.device, pad)
        return (found if run.is_sharded else run.sum(found)).cpu().numpy()

    def _note(self, run: Run) -> None:
        """Measure every gauge, log it and record it."""
        point: dict[str, Value] = {}
        for name, gauge in self.gauges.items():
            rows = self._start[name] if run.step == 0 else self._measured(run, name)
            values = values_of(rows, self._start[name], gauge.kl, by_row=not are_texts(self._rows[name]))
            for measure, value in values.items():
                point[f"{name}/{measure}"] = value
        point |= {name: Value(float(value), None) for name, value in run.measures().items()}
        self._history.add(run.step, point)
        run.log(self._logged(point))
        self._write(run)

    def _logged(self, point: Mapping[str, Value]) -> dict[str, float]:
        """The logged values, each with its error; the others are only in the file."""
        texts = {name for name, rows in self._rows.items() if are_texts(rows)}
        logged: dict[str, float] = {}
        for key, value in point.items():
            gauge, _, measure = key.partition("/")
            if measure in _IN_FILE or (measure == "exact" and gauge in texts):
                continue
            logged[f"{self.name}/{key}"] = value.value
            if value.se is not None:
                logged[f"{self.name}/{key}_se"] = value.se
        return logged

    def _act(self, run: Run) -> None:
        """Keep weights that pass, go back, or stop."""
        for kind, rules in (("rollback", self.rollback_if), ("stop", self.stop_if), ("stop", (self.saturated,))):
            for rule in rules:
                if rule is not None and (reason := rule.crossed(self._history.points)) is not None:
                    self._end(run, kind, str(rule), reason)
                    return
        self._keep_if_good(run)

    def _keep_if_good(self, run: Run) -> None:
        point = self._history.points[-1]
        if self.rollback_if and all(rule.passes(point) for rule in self.rollback_if):
            self._keep(run)
        if self.keep_best:
            total = sum(weight * point[gauge].value for gauge, weight in self.keep_best.items())
            if self._smallest is None or total < self._smallest:
                self._smallest = total
                self._keep(run)

    def _end(self, run: Run, event: str, rule: str, reason: str) -> None:
        if event == "rollback":
            if self._kept_at is None:
                reason += "; no earlier measurement passed, so the weights stay as they are"
            else:
                self._restore(run)
                reason += f"; back to the weights of step {self._kept_at}"
        self._event(run, event, rule, reason)
        self._go_back_to_best(run)
        run.stop(
            f"{'rolled back' if event == 'rollback' else 'stopped'} at step {run.step} by the rule {rule!r}: {reason}"
        )

    def _go_back_to_best(self, run: Run) -> None:
        if self.keep_best and self._kept_at not in (None, run.step):
            self._restore(run)
            named = " + ".join(f"{w:g} {g}" if w != 1 else g for g, w in self.keep_best.items())
            self._event(
                run, "keep_best", named, f"{named} was smallest ({self._smallest:.4g}) after step {self._kept_at}"
            )

    def _event(self, run: Run, event: str, rule: str, reason: str) -> None:
        self._history.events.append({"step": run.step, "event": event, "rule": rule, "reason": reason})
        logger.warning("%s: %s", event, reason)
        self._write(run)

    def _keep(self, run: Run) -> None:
        self._kept_at = run.step
        for name, p in run.named_parameters().items():
            if name not in self._kept:
                self._kept[name] = torch.empty_like(p, device="cpu", requires_grad=False)
            self._kept[name].copy_(p.detach())

    def _restore(self, run: Run) -> None:
        with torch.no_grad():
            for name, p in run.named_parameters().items():
                p.copy_(self._kept[name])
        run.weights_replaced()

    def _write(self, run: Run) -> None:
        """All points and events so far, as lines that reports read."""
        if not run.is_main_process or run.output_dir is None:
            return
        write_lines(run.output_dir / FILE, self._history.lines(run.task.name))

    def state_dict(self, run: Run) -> State:
        """The measurements so far, and the kept weights."""
        start = {f"start.{name}": torch.from_numpy(rows).clone() for name, rows in self._start.items()}
        kept = {f"kept.{name}": value for name, value in self._kept.items()}
        return {
            **start, **kept, **self._history.state(), "kept_at": self._kept_at, "smallest": self._smallest,
        }  # fmt: skip

    def load_state_dict(self, state: State, run: Run) -> None:
        """Restore the state of the checkpoint."""
        if not state:
            return  # a checkpoint without gauges
        if not self._history.load(state, self._measures):
            logger.warning("The gauges are not those of the checkpoint: earlier measurements are dropped.")
            return
        self._kept_at, self._smallest = state["kept_at"], state["smallest"]
        for key, value in state.items():
            kind, _, name = key.partition(".")
            if kind == "start" and name in self.gauges:
                self._start[name] = value.cpu().numpy()
            elif kind == "kept" and torch.is_tensor(value):
                self._kept[name] = value.cpu()
