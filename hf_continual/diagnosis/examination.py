"""`diagnose`: the recovery test with its control, and the evidence of weights and hidden states."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset

from hf_continual.data.columns import check_columns, take
from hf_continual.data.rows import load_rows
from hf_continual.diagnosis.halves import halves
from hf_continual.diagnosis.line import POINTS, along_the_line
from hf_continual.diagnosis.models import Patients, Source, fresh, in_memory, open_patients
from hf_continual.diagnosis.recovery import teach
from hf_continual.diagnosis.remedies import remedies_of
from hf_continual.diagnosis.result import Diagnosis
from hf_continual.diagnosis.states import shifts
from hf_continual.diagnosis.updates import RANK, update_layers
from hf_continual.diagnosis.verdict import ALPHA, MARGIN, judge
from hf_continual.evaluation.result import Scored
from hf_continual.evaluation.table import build_scorer, columns_of
from hf_continual.merging.inputs.run_model import representations, token_ids

logger = logging.getLogger(__name__)

FULL, ADAPTER = 2e-5, 2e-4  # learning rates that are usual for all weights, and for LoRA
STATES = 256  # rows whose hidden states are compared
LONGEST = 512  # tokens of these
LOOKS = (1 / 3, 2 / 3, 1.0)


@dataclass
class _Examination:
    """The parts of a running diagnosis."""

    patients: Patients
    tokenizer: Any
    shown: Dataset
    held: Dataset
    scorer: Callable[..., Scored]
    settings: dict[str, Any]
    device: str | None
    held_rows: dict[str, list[float]] = field(default_factory=dict)
    shown_means: dict[str, float] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    states: dict[str, np.ndarray] = field(default_factory=dict)
    recovery: dict[str, dict[int, float]] = field(default_factory=dict)

    def score(self, model: Any) -> Scored:
        return self.scorer(model, self.tokenizer, self.held)

    def note(self, moment: str, model: Any) -> Scored:
        """Score both halves, and keep the held rows' scores."""
        scored, own = self.score(model), self.scorer(model, self.tokenizer, self.shown)
        sign = -1.0 if scored.lower_is_better else 1.0
        self.held_rows[moment] = [sign * row.score for row in scored.rows]
        self.shown_means[moment] = sign * (own.score.value or 0.0)
        self.scores[moment] = {
            "held": scored.score.to_dict(),
            "shown": own.score.to_dict(),
            "held_nll": None if scored.nll is None else scored.nll.value,
        }
        logger.info("%s: %.4f on the held half", moment, scored.score.value or 0.0)
        return scored

    def recover(self, model: Any, arm: str, moment: str) -> None:
        """The short training, with looks at the held rows."""
        steps = self.settings["steps"]
        curve = self.recovery.setdefault(
            arm, {0: float(np.mean(self.held_rows["after" if arm == "after" else "base"]))}
        )
        looks = sorted({max(round(steps * share), 1) for share in LOOKS[:-1]} - {steps})

        def look(step: int) -> None:
            scored = self.score(model)
            curve[step] = (-1.0 if scored.lower_is_better else 1.0) * (scored.score.value or 0.0)

        teach(
            model, self.tokenizer, self.shown, steps, self.settings["learning_rate"], self.settings["batch_size"],
            self.settings["seed"], look, looks,
        )  # fmt: skip
        self.note(moment, model)
        curve[steps] = float(np.mean(self.held_rows[moment]))


def diagnose(
    before: Source,
    after: Source,
    rows: Any,
    base: Source | None = None,
    *,
    steps: int = 30,
    learning_rate: float | None = None,
    batch_size: int = 16,
    metric: Any = "exact_match",
    group: str | None = None,
    limit: int | None = 2000,
    margin: float = MARGIN,
    alpha: float = ALPHA,
    rank: int = RANK,
    seed: int = 0,
    device: str | None = None,
) -> Diagnosis:
    """Find out whether what a model forgot is gone, or only hidden.

    The old rows are split in two halves. AFTER is trained a few steps on one, and scored on the other, which it is never
    shown: what comes back there was not gone, as far as it exceeds what the control, BEFORE's base after the same steps, knows
    of it. The rule with its intervals is `hf_continual.diagnosis.verdict`. In addition, and not part of the rule: angles between
    weight updates, likeness of hidden states, and the loss along the line between the two, from which remedies are suggested.

    Example:
        >>> diagnose("out/task-0", "out/task-1", "old.jsonl", base="out/base").verdict

    Cost: `steps` training steps in fp32 with AdamW (16 bytes per trained weight), twice with a control; 9 to 13 passes over the
    held rows; each checkpoint read 3 to 7 times, one matrix at a time. One model is in memory at a time.

    Args:
        before: Folder or Hub id of the model before the new training; a full model or a LoRA adapter.
        after: The model after it.
        rows: Rows of what was known before: prompts with answers; see `hf_continual.data.rows.load_rows`.
        base: Full model that BEFORE was trained from, for the control and the angles. By default what BEFORE, if it is an
            adapter, names as its base. Without one nothing can be found spurious.
        steps: Steps of the short training.
        learning_rate: Its rate; by default 2e-5 for full models and 2e-4 for adapters. It must suffice to learn the shown half.
        batch_size: Rows per step, and per forward pass.
        metric: How rows are scored, see `hf_continual.evaluation.table.build_scorer`.
        group: Column of rows that belong together, such as the person asked about; they stay in one half.
        limit: Maximum number of rows, drawn with the seed.
        margin: Difference of scores that counts.
        alpha: 1 - the confidence of the intervals.
        rank: Directions of each weight update that are compared.
        seed: Seed of the halves, the order and a new adapter.
        device: Where models run; by default the accelerator if there is one.

    Returns:
        The diagnosis.

    Raises:
        ValueError: If the rows or options cannot be used.
        FileNotFoundError: If a model or the rows are not there.
    """
    _check_numbers(
        steps=steps, batch_size=batch_size, rank=rank, margin=margin, alpha=alpha, learning_rate=learning_rate
    )
    data = take(load_rows(rows, "train", columns_of(metric)), limit, seed)
    check_columns(data, columns_of(metric, data.column_names), "the old rows")
    shown, held = halves(data, seed, group)
    scorer = build_scorer(metric, batch_size)
    patients = open_patients(before, after, base)
    rate = learning_rate or (FULL if patients.after.adapter is None else ADAPTER)
    settings = {
        "before": str(before), "after": str(after), "base": None if patients.base is None else patients.base.name,
        "rows": rows if isinstance(rows, str) else None, "shown": len(shown), "held": len(held), "steps": steps,
        "learning_rate": rate, "batch_size": batch_size, "metric": metric if isinstance(metric, str | dict) else repr(metric),
        "group": group, "margin": margin, "alpha": alpha, "rank": rank, "seed": seed,
    }  # fmt: skip
    examined = _Examination(patients, patients.tokenizer, shown, held, scorer, settings, device)
    return _examined(examined)


def _examined(e: _Examination) -> Diagnosis:
    notes = []
    ids, _ = token_ids(e.held, e.tokenizer, STATES, LONGEST)
    for moment, member in (("before", e.patients.before), ("after", e.patients.after)):
        with in_memory(member, e.device) as model:
            e.note(moment, model)
            e.states[moment] = representations(model, ids, e.settings["batch_size"])
            if moment == "after":
                e.recover(model, "after", "recovered")
    if e.patients.base is None:
        notes.append(
            "There was no control, as BEFORE's base is not known: nothing can be found spurious. Name it (base)."
        )
    else:
        with fresh(e.patients, e.settings["seed"], e.device) as model:
            e.note("base", model)
            e.recover(model, "control", "control")
    layers = _layers(e)
    line = [
        _point(share, scored)
        for share, scored in zip(POINTS, along_the_line(e.patients, e.score, POINTS, e.device), strict=False)
    ]
    if not line:
        notes.append(
            "The line between the two was not walked: their tensors differ in shape, or are named otherwise on the disk."
        )
    known = e.shown_means["before"]
    taught = e.shown_means["recovered"] / known if known > 0 else None
    judged = judge(e.held_rows, taught, e.settings["margin"], e.settings["alpha"], seed=e.settings["seed"])
    remedies = remedies_of(judged, _named(e), layers, line, e.settings)
    return Diagnosis(
        judged.verdict, judged.reason, judged.confidence, e.scores, judged.tests, e.recovery, layers, line, remedies, notes,
        e.settings,
    )  # fmt: skip


def _layers(e: _Examination) -> list[Mapping[str, Any]]:
    """Weights and states by layer; the states before the first block go with the embeddings, those of the norm with the rest."""
    weights = update_layers(e.patients.before, e.patients.after, e.patients.base, e.settings["rank"])
    moved = shifts(e.states["before"], e.states["after"])
    places = ["embed", *(f"layer.{i}" for i in range(len(moved) - 2)), "final"]
    found = dict(zip(places, moved, strict=True))
    return [{**entry, **found.get(entry["layer"], {"cka": None, "moved": None})} for entry in weights]


def _point(share: float, scored: Scored) -> dict[str, float]:
    value = (-1.0 if scored.lower_is_better else 1.0) * (scored.score.value or 0.0)
    loss = {} if scored.nll is None or scored.nll.value is None else {"nll": scored.nll.value}
    return {"share": share, "score": value, **loss}


def _named(e: _Examination) -> dict[str, str]:
    """What the commands name."""
    below = str(e.patients.after.checkpoint.folder) if e.patients.after.adapter is not None else ""
    return {
        "before": e.settings["before"], "after": e.settings["after"], "rows": e.settings["rows"] or "OLD_ROWS.jsonl", "below": below,
    }  # fmt: skip


def _check_numbers(**given: float | None) -> None:
    for name in ("steps", "batch_size", "rank"):
        value = given[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"diagnose({name}={value!r}) must be a whole number of at least 1.")
    for name, high in (("margin", float("inf")), ("alpha", 1.0), ("learning_rate", float("inf"))):
        value = given[name]
        if value is not None and not 0 < value < high:
            raise ValueError(f"diagnose({name}={value!r}) must be above 0{'' if high > 1 else ' and below 1'}.")
