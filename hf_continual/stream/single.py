"""One set of rows without a plan, for `hf-continual train`, read as a plan of one task.

The file of `--config` holds fields of ContinualConfig, as most recipes do. The model is saved in the output folder itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_continual.stream.overrides import override
from hf_continual.stream.plan import Plan
from hf_continual.stream.plan_lines import Key, PlanError, PlanLoader, Where, read_yaml
from hf_continual.stream.read_plan import check_read

# Entries of the file or the command -> their place in a plan; all others are training arguments.
PLACES: dict[str, tuple[Key, ...]] = {
    "model": ("model",), "output_dir": ("output_dir",), "seed": ("seed",), "peft": ("peft",), "methods": ("methods",),
    "max_minutes": ("max_minutes",), "metric": ("evaluation", "metric"), "batch_size": ("evaluation", "batch_size"),
    "train": ("tasks", 0, "train"), "test": ("tasks", 0, "test"), "split": ("tasks", 0, "split"),
    "test_split": ("tasks", 0, "test_split"), "columns": ("tasks", 0, "columns"), "labels": ("tasks", 0, "labels"),
    "train_rows": ("tasks", 0, "train_rows"), "test_rows": ("tasks", 0, "test_rows"), "task_name": ("tasks", 0, "name"),
}  # fmt: skip
SHORT = {"out": "output_dir", "output": "output_dir", "data": "train", "steps": "max_steps"}
YAML = ("methods", "peft", "metric")
MISSING = {
    "model": "No model is given. Use --model FOLDER_OR_HUB_ID, or model: in the file.",
    "train": "No rows are given. Use --train ROWS.jsonl, or train: in the file.",
}


def said_of_score(cell: Mapping[str, Any]) -> str:
    """A score as text.

    Args:
        cell: As returned by `Score.to_dict`.

    Returns:
        Such as ``exact match 87.5 % (n = 16)``.
    """
    if cell["value"] is None:
        return f"{cell['protocol']}: not measured"
    scale, unit = (1, "") if cell["lower_is_better"] else (100, " %")
    bounds = cell.get("interval")
    within = "" if not bounds else f", 95 % interval {scale * bounds[0]:.1f} to {scale * bounds[1]:.1f}{unit}"
    return f"{cell['protocol']} {scale * cell['value']:.{3 if cell['lower_is_better'] else 1}f}{unit} (n = {cell['n']}{within})"


def read_single(config: Path | None, given: Mapping[str, Any], overrides: Sequence[str]) -> tuple[Plan, Where]:
    """Read a file and the options of the command as a plan of one task.

    Args:
        config: A file with fields of ContinualConfig, or None.
        given: Options of the command by name.
        overrides: Entries that override the file's, as ``KEY=VALUE``.

    Returns:
        The plan, and where its entries are written.

    Raises:
        PlanError: If something is unknown, missing or of the wrong type.
    """
    data, where = ({}, Where("the command line")) if config is None else read_yaml(config)
    if not isinstance(data, dict):
        raise where.error((), f"a configuration is a mapping of training arguments, not {type(data).__name__}.")
    if "tasks" in data:
        raise where.error(("tasks",), f"this is a plan: run it with hf-continual run {config}.")
    for key, value in given.items():
        name = SHORT.get(key, key)
        data[name] = _parsed(key, value) if key in YAML else value
        where.overridden[(name,)] = f"--{key.replace('_', '-')} {value}"
    pairs = [f"{SHORT.get(p.partition('=')[0], p.partition('=')[0])}{p[len(p.partition('=')[0]) :]}" for p in overrides]
    data = override(data, pairs, where, steps="max_steps")
    for key in ("model", "train"):
        if data.get(key) is None:
            raise PlanError(MISSING[key])
    return check_read(_as_plan(data), _moved(where))


def _parsed(key: str, text: str) -> Any:
    """Parse an option that is written as YAML or JSON."""
    try:
        return yaml.load(text, PlanLoader)
    except yaml.YAMLError as error:
        raise PlanError(f"--{key} {text}: not valid YAML: {getattr(error, 'problem', error)}.") from None


def _as_plan(data: Mapping[str, Any]) -> dict[str, Any]:
    task: dict[str, Any] = {"name": Path(str(data["train"])).stem or "task"}
    # Tasks that the base can already do are trained anyway: there is one task, and no forgetting to measure.
    plan: dict[str, Any] = {"output_dir": "out", "sft": {}, "tasks": [task], "evaluation": {"solved_at": None}}
    for key, value in data.items():
        place = PLACES.get(key, ("sft", key))
        if key == "from_adapter":
            continue
        at: Any = plan
        for part in place[:-1]:
            at = at[part]
        at[place[-1]] = value
    if (way := data.get("from_adapter")) is not None:
        model = plan["model"]
        plan["model"] = {**(model if isinstance(model, dict) else {"path": model}), "from_adapter": way}
    return plan


def _moved(where: Where) -> Where:
    """The places of a file's entries, by their place in the plan."""

    def place(path: tuple[Key, ...]) -> tuple[Key, ...]:
        if not path:
            return path
        if path[0] == "from_adapter":
            return ("model", "from_adapter")
        return (*PLACES.get(str(path[0]), ("sft", path[0])), *path[1:])

    moved = Where(where.file, {place(path): line for path, line in where.lines.items()})
    moved.overridden = {place(path): said for path, said in where.overridden.items()}
    return moved
