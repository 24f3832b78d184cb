"""Which methods for a plan: rules from a table (`recommendations.yaml`), each with the measured row that it rests on.

Nothing here imports torch, and no rows are read: what is asked of a plan is in its text.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hf_continual.inference.names import METHODS as OWN_MODULES
from hf_continual.stream.plan import MemoryPlan, Plan

TABLE = Path(__file__).with_name("recommendations.yaml")
MOST = 3
BASELINES = {"baselines": {"learning_rates": ["x", "x/3", "x/10"]}}
# What a plan's value of a fact may be.
FACTS: dict[str, tuple[str, ...]] = {
    "tasks": ("one", "sequence"),
    "weights": ("full", "adapter"),
    "quantized": ("yes", "no"),
    "old_rows": ("all", "kept", "none"),
    "general_text": ("yes", "no"),
}
_WORDS = ("earlier_tasks", "kept", "self")


@dataclass(frozen=True)
class Measured:
    """A row of a table that was measured.

    Args:
        file: File of this repository that holds it.
        head: The table's first line.
        row: The row.
        setting: What it was measured on.
    """

    file: str
    head: str
    row: str
    setting: str


@dataclass(frozen=True)
class Rule:
    """A composition, and when it fits.

    Args:
        name: Its name.
        title: What it does.
        when: Values of facts that it fits; a fact that is not named may have any.
        changes: Keys of a plan; OLD and GENERAL stand for files.
        why: The reason.
        avoid: When not to use it.
        measured: The row that it rests on.
        note: What to adapt.
    """

    name: str
    title: str
    when: Mapping[str, Sequence[str]]
    changes: Mapping[str, Any]
    why: str
    avoid: str
    measured: Measured
    note: str = ""

    def fits(self, facts: Mapping[str, str]) -> bool:
        """Whether the facts are those that it is for."""
        return all(facts[name] in values for name, values in self.when.items())


@cache
def rules() -> tuple[Rule, ...]:
    """The table, in order."""
    listed: list[dict[str, Any]] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return tuple(Rule(measured=Measured(**entry.pop("measured")), **entry) for entry in listed)


def facts_of(plan: Plan, old: str | None = None, general: str | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """What a plan has.

    Args:
        plan: As read.
        old: File of old rows that the plan does not name.
        general: File of general text that it does not name.

    Returns:
        A value for each of `FACTS`; and the files of old rows (OLD) and of general text (GENERAL), where they are known. Rows
        of a gauge are held out, so they are not taken for either.
    """
    files: dict[str, str] = {}
    for name, options in _methods_of(plan):
        given = next((v for k in ("rows", "memory") if isinstance(v := options.get(k), str) and v not in _WORDS), None)
        text = name == "gere" or options.get("row_type") == "text"
        if given is not None:
            files.setdefault("GENERAL" if text else "OLD", given)
    files |= {key: value for key, value in (("OLD", old), ("GENERAL", general)) if value is not None}
    sequence = len(plan.tasks) > 1
    own = any(name in OWN_MODULES for name, _ in _methods_of(plan))
    adapter = plan.peft is not None or plan.model.adapter is not None or own
    quantization = plan.model.quantization or {}
    kept = "kept" if isinstance(plan.memory, MemoryPlan) else "all" if sequence or "OLD" in files else "none"
    return {
        "tasks": "sequence" if sequence else "one",
        "weights": "adapter" if adapter else "full",
        "quantized": "yes" if any(quantization.get(f"load_in_{bits}bit") for bits in (4, 8)) else "no",
        "old_rows": "none" if plan.memory == "forbidden" else kept,
        "general_text": "yes" if "GENERAL" in files else "no",
    }, files


def _methods_of(plan: Plan) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Names and options of the methods in a plan and its arms."""
    sweep = plan.sweep
    arms = [] if sweep is None else [*(sweep.methods or {}).values(), *(a.methods for a in (sweep.arms or {}).values())]
    waiting = [plan.methods, *(task.methods for task in plan.tasks), *arms]
    while waiting:
        found = waiting.pop(0)
        if isinstance(found, str):
            yield found, {}
        elif isinstance(found, Mapping):
            yield from ((str(k), v if isinstance(v, Mapping) else {}) for k, v in found.items())
        elif isinstance(found, Sequence):
            waiting += found


def recommended(facts: Mapping[str, str]) -> list[Rule]:
    """The rules that fit, at most `MOST`, the first of the table first.

    Args:
        facts: A value for each of `FACTS`.

    Returns:
        Two or three rules.
    """
    return [rule for rule in rules() if rule.fits(facts)][:MOST]


def changes_of(rule: Rule, files: Mapping[str, str]) -> dict[str, Any]:
    """The keys that a rule changes in a plan, with its files, and the plain runs that it should be compared with."""

    def put(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: put(v) for k, v in value.items()}
        if isinstance(value, list):
            return [put(v) for v in value]
        return files.get(value, value) if isinstance(value, str) else value

    return {**put(rule.changes), **copy.deepcopy(BASELINES)}


def changed_plan(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A plan with a recommendation in place of its methods and its sweep.

    Args:
        data: The plan as in its file.
        changes: See `changes_of`.

    Returns:
        The plan as plain data.
    """
    plan = {k: copy.deepcopy(v) for k, v in data.items() if k not in ("sweep", "methods", "between_tasks", "baselines")}
    tasks = plan["tasks"] if isinstance(plan.get("tasks"), list) else []
    for task in tasks:
        if isinstance(task, dict):
            task.pop("methods", None)
    if "merge" in (changes.get("between_tasks") or {}):
        plan.pop("memory", None)
    return {**plan, **copy.deepcopy(dict(changes))}


def as_yaml(data: Any) -> str:
    """Plain data as YAML that a plan's reader takes; short mappings in one line."""
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)


def described(rule: Rule, data: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    """A recommendation as plain data: the rule, its snippet, and the whole plan."""
    changes = changes_of(rule, files)
    return {**asdict(rule), "changes": changes, "snippet": as_yaml(changes), "plan": changed_plan(data, changes)}


def page() -> str:
    """`recipes/choosing.md`."""
    text = [
        "# Which method when",
        "",
        "Written from [`recommendations.yaml`](../hf_continual/stream/recommendations.yaml) by `python -m tests.stream.choosing`; a test checks",
        "it, and that every row quoted here is in the file that it names. `hf-continual recommend plan.yaml` picks from this table by what the",
        "plan has, and prints the keys to put into it (`--general FILE` and `--old FILE` tell it of files that the plan does not name).",
        "",
        "All of it was measured on small models; none of it is a law. Compare with plain fine-tuning at several learning rates, which is part of",
        "every snippet: `baselines: {learning_rates: [x, x/3, x/10]}` ([recipes/sequence](sequence)).",
        "",
        *_by_what_you_have(),
        "",
        "Old scores are known if a released model was scored on the same rows: `hf-continual gate` then compares row by row. If they are not known, a",
        "plan scores the base and every task after each task; for a model that others trained, score it before you begin, and see",
        "[seeing and stopping](guide/watching.md).",
        "",
        "| name | what it does | if the plan has | measured in |",
        "|---|---|---|---|",
    ]
    for rule in rules():
        home = _link(rule.measured.file)
        text.append(f"| [`{rule.name}`](#{rule.name}) | {rule.title} | {_if(rule)} | {home} |")
    for rule in rules():
        columns = rule.measured.head.count("|") - 1
        text += [
            "", f"## {rule.name}", "", f"{rule.title}. {rule.why}{' ' + rule.note if rule.note else ''}", "",
            f"Not if: {rule.avoid}", "", "```yaml", as_yaml(dict(rule.changes)).rstrip(), "```", "",
            f"Measured ({rule.measured.setting}), {_link(rule.measured.file)}:", "", rule.measured.head, "|---" * columns + "|",
            rule.measured.row,
        ]  # fmt: skip
    return "\n".join(text) + "\n"


def _by_what_you_have() -> list[str]:
    """A table of what is recommended for each combination of facts."""
    kinds = {"all weights": ("full", "no"), "LoRA": ("adapter", "no"), "LoRA on 4 bits": ("adapter", "yes")}
    keep = {"all": "may be used again", "kept": "a buffer of them is kept", "none": "may not be kept"}
    lines = [f"| tasks | old rows | general text | {' | '.join(kinds)} |", "|---" * (3 + len(kinds)) + "|"]
    for tasks in ("one", "sequence"):
        for old_rows, said in keep.items():
            for general_text in ("yes", "no"):
                known = {"tasks": tasks, "old_rows": old_rows, "general_text": general_text}
                cells = [
                    ", ".join(f"[{r.name}](#{r.name})" for r in recommended({**known, "weights": w, "quantized": q}))
                    for w, q in kinds.values()
                ]
                lines.append(f"| {tasks} | {said} | {general_text} | {' | '.join(cells)} |")
    return lines


def _link(file: str) -> str:
    return f"[{file}](../{file})" if "/" not in file else f"[{file}]({file.removeprefix('recipes/')})"


def _if(rule: Rule) -> str:
    words = {
        "tasks": "tasks",
        "weights": "weights",
        "quantized": "quantized",
        "old_rows": "old rows",
        "general_text": "general text",
    }
    return "; ".join(f"{words[name]}: {' or '.join(values)}" for name, values in rule.when.items())
