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
    sides = data.get("layers")
    if isinstance(sides, Mapping) and sides:
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


def _of_diagnosis(data: Mapping[str, Any], source: str) -> Iterator[Layers]:
    """Every series over layers that a diagnosis holds, wherever it stands in it: angles in degrees, CKA from 0 to 1."""
    for name, series in _series(data):
        unit = "degrees" if "angle" in name else "CKA" if "cka" in name else ""
        key = name.replace("_", " ")
        values = {layer: {key: value} for layer, value in series.items()}
        yield Layers(f"diagnosis: {key} by layer", source, "lines", values, unit)


def _series(data: Any, name: str = "") -> Iterator[tuple[str, dict[str, float]]]:
    """Names and numbers by layer: ``{"layer.0": 12.5}``, or ``[{"layer": "layer.0", "angle": 12.5}]``."""
    if isinstance(data, Mapping):
        if name and len(data) > 1 and all(number(v) is not None and _is_layer(k) for k, v in data.items()):
            yield name, {str(k): float(v) for k, v in data.items()}
            return
        for key, value in data.items():
            yield from _series(value, str(key))
    elif isinstance(data, list) and data and all(isinstance(row, Mapping) and "layer" in row for row in data):
        keys = dict.fromkeys(k for row in data for k, v in row.items() if k != "layer" and number(v) is not None)
        for key in keys:
            yield key, {str(row["layer"]): float(row[key]) for row in data if number(row.get(key)) is not None}


def _is_layer(key: Any) -> bool:
    return bool(re.fullmatch(r"(?:.*layers?[. ]?|.*blocks?[. ]?)?\d+|embed\w*|final\w*|head|lm_head|norm", str(key)))
