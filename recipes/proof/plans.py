"""The plans of a preset: a data set's plan with the preset's steps, rows, seeds and arms."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

from hf_continual.atomic_files import write_lines

HERE = Path(__file__).parent
PROBES = ("arc_easy", "piqa")
BEST = "best"  # stands for the composition that tuning chose


def read(name: str) -> Any:
    """A YAML file of this folder."""
    return yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))


def filled(value: Any, values: Mapping[str, Any], data: Path, out: Path) -> Any:
    """A plan's part with ``$NAME``, ``data/`` and ``out/`` replaced.

    Args:
        value: Mapping, list or scalar.
        values: Numbers by name.
        data: Folder of the data.
        out: Folder of the output.

    Returns:
        The same with the replacements.
    """
    if isinstance(value, dict):
        return {k: filled(v, values, data, out) for k, v in value.items()}
    if isinstance(value, list):
        return [filled(v, values, data, out) for v in value]
    if isinstance(value, str):
        if value.startswith("$"):
            return values[value[1:]]
        for prefix, folder in (("data/", data), ("out/", out)):
            if value.startswith(prefix):
                return str(folder / value.removeprefix(prefix))
    return value


def shortened(prompt: str, last: int) -> str:
    """The first line, which is the instruction, and the last characters of the rest."""
    head, line, rest = prompt.partition("\n")
    return head + line + rest[-last:] if line else prompt[-last:]


def trace_rows(source: str, last: int, answer: int | None, out: Path) -> str:
    """TRACE's rows as prompts and completions, with shorter prompts.

    Args:
        source: A list of ``{"prompt", "answer"}``.
        last: Characters to keep of a prompt, besides its first line.
        answer: Characters to keep of an answer; None keeps all.
        out: Folder of the output.

    Returns:
        The new file.
    """
    file = Path(source)
    rows = json.loads(file.read_text(encoding="utf-8"))
    made = out / "rows" / f"{file.parent.name}.{file.stem}.jsonl"
    made.parent.mkdir(parents=True, exist_ok=True)
    write_lines(made, [{"prompt": shortened(r["prompt"], last), "completion": r["answer"][:answer]} for r in rows])
    return str(made)


def tasks_of(plan: Mapping[str, Any], part: Mapping[str, Any], out: Path) -> list[dict[str, Any]]:
    """The tasks in the part's order, with its number of rows; tuning scores development rows."""
    by_name = {task["name"]: dict(task) for task in plan["tasks"]}
    tasks = []
    for name in part.get("order", by_name):
        task = {**by_name[name], "train_rows": part["train_rows"], "test_rows": part["test_rows"]}
        last, answer = task.pop("last", None), task.pop("answer", None)
        if last is not None:
            task |= {split: trace_rows(task[split], last, answer, out) for split in ("train", "test")}
        if part["use"] == "tuning":
            task["test"] = task["test"].replace(".test.", ".dev.")
        tasks.append(task)
    return tasks


def folder_of(part: Mapping[str, Any], first: Any = None) -> str:
    """The folder of a part's runs; runs whose first task has settings of its own are another sweep."""
    return f"{part['use']}-{part['data']}" + ("" if first is None else "-first-task")


def build(
    preset: Mapping[str, Any], part: Mapping[str, Any], arm: str, data: Path, out: Path, model: str | None = None
) -> dict[str, Any]:
    """The plan of an arm, its seeds as a sweep. The arms of a part share a folder, and so the scores of the base model.

    Args:
        preset: An entry of presets.yaml.
        part: One of its parts.
        arm: A key of arms.yaml.
        data: Folder of the data.
        out: Folder of the output.
        model: Folder or Hub id in place of the plan's model.

    Returns:
        A plan for `train_stream`.
    """
    plan = copy.deepcopy(read(part["data"]))
    plan["model"]["path"] = model or plan["model"]["path"]
    plan["model"]["dtype"] = preset.get("dtype", plan["model"]["dtype"])
    blocks = AutoConfig.from_pretrained(plan["model"]["path"]).num_hidden_layers
    steps, number = preset["steps"], len(part.get("order", plan["tasks"]))
    values = {
        "steps": steps, "inner": steps * 2 // 3, "all": steps * number, "memory": part["memory"], "fifth": max(1, blocks // 5),
    }  # fmt: skip
    changes = filled(read("arms")[arm], values, data, out)
    first = changes.pop("first_task", None)
    plan = filled(plan, values, data, out)
    plan["sweep"] = {"seeds": part["seeds"], "arms": {arm: changes}}
    plan["output_dir"] = str(out / folder_of(part, first))
    plan["data_seed"] = 20 if part["use"] == "tuning" else 0
    plan["sft"] |= {**preset["sft"], "max_steps": steps}
    plan["sft"]["gauges"] = {
        **plan["sft"]["gauges"],
        "every": steps * number,
    }  # before the first step and after the last
    plan["tasks"] = tasks_of(plan, part, out)
    if first is not None:
        plan["tasks"][0]["sft"] = first
    plan["evaluation"]["tasks"] = part.get("tasks", plan["evaluation"]["tasks"])
    gauges = plan["evaluation"]["gauges"]
    gauges["general"]["limit"] = part["general"]
    for name in PROBES if preset.get("probes") else ():
        rows = str(data / "probes" / f"{name}.jsonl")
        gauges[name] = {"rows": rows, "split": "train", "limit": preset["probes"], "metric": "multiple_choice"}
    return plan
