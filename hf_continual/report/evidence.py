"""Evidence in a run's folder that not every run leaves: gauges during training, merges layer by layer, diagnoses."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_continual.atomic_files import DamagedFile, read_lines, read_object
from hf_continual.report.run import Event, Layers, Point, Run, Timeline

GAUGES = Path("continual") / "gauges.jsonl"
DIAGNOSIS = "diagnosis.json"
EVENTS = ("stop", "rollback", "keep_best")
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def read_timeline(run: Run, folders: Sequence[tuple[str, Path, int | None]]) -> Timeline:
    """Read the gauges and the rules' events of every task.

    Args:
        run: The run; what cannot be read is added to its `missing`.
        folders: Task, its folder, and its optimizer steps where they are known, in the order of training.

    Returns:
        The gauges over the steps of the whole sequence.
    """
    found, begin = Timeline(), 0.0
    for task, folder, steps in folders:
        found.boundaries.append((begin, task))
        end = 0.0
        for line in _lines(run, folder / GAUGES):
            step = number(line.get("step"))
            if step is None:
                continue
            end = max(end, step)
            value = number(line.get("value"))
            if line.get("event") in EVENTS:
                rule, reason = str(line.get("rule", "")), str(line.get("reason", ""))
                found.events.append(Event(task, step, begin + step, line["event"], rule, reason))
            elif value is not None and line.get("gauge"):
                found.points.append(Point(str(line["gauge"]), begin + step, value, number(line.get("se"))))
        begin += steps if steps is not None else end
    return found


def _lines(run: Run, file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    try:
        return read_lines(file)
    except DamagedFile as error:
        run.missing.append(f"Gauges during training were left out: {error}")
        return []


def read_layers(run: Run, folders: Sequence[Path]) -> None:
    """Read the reports of merges and the diagnoses in some folders into the run.

    Args:
        run: The run.
        folders: Its folder and those of its tasks.
    """
    for folder in dict.fromkeys(folders):
        for file in sorted([*folder.glob("*_report.json"), *folder.glob(DIAGNOSIS)]):
            source = str(file.relative_to(run.folder)) if file.is_relative_to(run.folder) else file.name
            try:
                data = read_object(file)
                if file.name == DIAGNOSIS:
                    run.diagnoses.append((source, data))
                    run.layers += list(_of_diagnosis(data, source))
                else:
                    run.layers += list(_of_merge(data, source))
            except (DamagedFile, KeyError, TypeError, AttributeError, ValueError) as error:
                run.missing.append(f"{source} was left out: it cannot be read as evidence ({error}).")


def _of_merge(data: Mapping[str, Any], source: str) -> Iterator[Layers]:
    """What a merge's report says of each layer."""
    method = str(data.get("method", "merge"))
    models = [m for m in data.get("models", []) if isinstance(m, Mapping)]
    weights = data.get("weights")
    if isinstance(weights, Mapping) and weights:
        count = len(next(iter(weights.values())))
        names = [str(m.get("name")) for m in models if count == len(models) or m.get("role") != "base"]
        names = names if len(names) == count else [f"model {i + 1}" for i in range(count)]
        names = [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]
        shares = {layer: dict(zip(names, map(float, row), strict=True)) for layer, row in weights.items()}
        yield Layers(f"{method}: weight of each model by layer", source, "weights", shares, "weight")
    if sides := {str(layer): _sides(row) for layer, row in (data.get("layers") or {}).items()}:
        yield Layers(
            f"{method}: which side the elements of each layer went to", source, "sides", sides, "% of the layer"
        )
    cosines = data.get("cosines")
    if isinstance(cosines, Mapping) and cosines:
        angles: dict[str, list[float]] = {}
        for name, value in cosines.items():
            at = _NUMBER.search(str(name))
            angle = math.degrees(math.acos(min(1.0, max(-1.0, float(value)))))
            angles.setdefault(f"layer {at[1]}" if at else str(name), []).append(angle)
        means = {layer: {"mean over tensors": sum(row) / len(row)} for layer, row in angles.items()}
        yield Layers(f"{method}: angle between the two models' weights", source, "lines", means, "degrees")


def _sides(row: Mapping[str, Any]) -> dict[str, float]:
    """The counts of a layer that was fused, or the weight of its new side."""
    keys = ("new_weight",) if "new_weight" in row else ("elements", "both", "new_only", "old_only", "neither")
    return {key: float(row[key]) for key in keys}


# Pictures of a diagnosis: title, what its lines are called there and here, unit.
_BY_LAYER = (
    ("angle between the new update and the old one", {"angle": "angle", "chance": "by chance"}, "degrees"),
    ("size of the updates", {"size": "new update", "old_size": "old update"}, "share of the weights' norm"),
    ("likeness of the hidden states before and after", {"cka": "linear CKA"}, "linear CKA"),
)


def _of_diagnosis(data: Mapping[str, Any], source: str) -> Iterator[Layers]:
    """What `hf_continual.diagnosis` found by layer, by step of the recovery, and along the line between the checkpoints."""
    rows = [row for row in data.get("layers") or () if isinstance(row, Mapping)]
    for title, names, unit in _BY_LAYER:
        values = {str(row.get("layer")): _named(row, names) for row in rows}
        if any(values.values()):
            yield Layers(f"diagnosis: {title}", source, "lines", values, unit)
    arms = {"after": "AFTER", "control": "control: the base"}
    curves = {arms.get(arm, arm): curve for arm, curve in (data.get("recovery") or {}).items()}
    steps = sorted({int(step) for curve in curves.values() for step in curve})
    if steps:
        by_step = {str(step): {arm: curve.get(str(step)) for arm, curve in curves.items()} for step in steps}
        values = {step: _named(row, {arm: arm for arm in curves}) for step, row in by_step.items()}
        yield Layers(
            "diagnosis: recovery of rows that are never shown",
            source,
            "lines",
            values,
            "score",
            "steps of the short training",
        )
    points = [point for point in data.get("line") or () if isinstance(point, Mapping)]
    for key, unit in (("score", "score"), ("nll", "loss (nats per token)")):
        values = {f"{point.get('share')}": _named(point, {key: "old rows"}) for point in points}
        if any(values.values()):
            yield Layers(
                f"diagnosis: {key} along the line",
                source,
                "lines",
                values,
                unit,
                "share of the way from BEFORE to AFTER",
            )


def _named(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, float]:
    """The numbers that a row has, under the names they are shown with."""
    return {shown: value for key, shown in names.items() if (value := number(row.get(key))) is not None}
