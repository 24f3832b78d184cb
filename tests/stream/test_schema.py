"""The JSON schema of plans: every plan of the recipes fits it, and what the reader refuses by name or type does not."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft7Validator

from hf_continual.data.benchmarks import BENCHMARKS
from hf_continual.evaluation.table import SCORERS
from hf_continual.merging.methods.table import MERGES
from hf_continual.methods.table import TABLE
from hf_continual.plain import hyper_parameters
from hf_continual.stream.overrides import override
from hf_continual.stream.plan_lines import PlanError, PlanLoader, Where
from hf_continual.stream.plan_schema import plan_schema
from hf_continual.stream.read_plan import read_plan
from hf_continual.stream.recommend import changed_plan, changes_of, rules
from tests.first_hour.typed import typed
from tests.stream import world

ROOT = Path(__file__).parents[2]
PLANS = sorted(  # those of recipes/proof are not plans: its run.py reads further keys first
    p
    for p in (ROOT / "recipes").glob("*/*.yaml")
    if p.parent.name != "proof" and "tasks" in yaml.safe_load(p.read_text(encoding="utf-8"))
)
SMALL = {"model": "model", "output_dir": "out", "tasks": [{"name": "a", "train": "a.jsonl"}]}


@pytest.fixture(scope="module")
def schema():
    found = plan_schema()
    Draft7Validator.check_schema(found)
    return found


@pytest.fixture(scope="module")
def fits(schema):
    return Draft7Validator(schema).is_valid


def test_the_plans_are_found():
    assert {p.parent.name for p in PLANS} >= {"sequence", "baselines", "frontier"}


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_plan_of_the_recipes_fits(plan, schema):
    data = yaml.load(plan.read_text(encoding="utf-8"), PlanLoader)
    assert [error.message for error in Draft7Validator(schema).iter_errors(data)] == []


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.name)
def test_every_recommendation_fits(rule, fits):
    assert fits(changed_plan(copy.deepcopy(SMALL), changes_of(rule, {"OLD": "old.jsonl", "GENERAL": "general.jsonl"})))


def test_the_tables_are_in_it(schema):
    parts = schema["$defs"]
    assert set(parts) >= {f"method-{n}" for n in TABLE} | {f"merge-{n}" for n in MERGES} | {
        f"metric-{n}" for n in SCORERS
    }
    assert set(parts) >= {f"benchmark-{n}" for n in BENCHMARKS}
    from hf_continual.methods.table import method_class

    for name in TABLE:
        entry = parts[f"method-{name}"]
        assert list(entry["properties"]) == hyper_parameters(method_class(name)) and entry["description"]
        # Every option has the sentence of its docstring.
        assert all(option.get("description") for option in entry["properties"].values()), name
    undocumented = [
        f"{name}.{key}"
        for name in ("ModelPlan", "TaskPlan", "EvaluationPlan", "GaugePlan", "MergePlan", "MemoryPlan", "SweepPlan")
        for key, part in parts[name]["properties"].items()
        if "description" not in part
    ]
    assert undocumented == []


def test_every_reference_is_there(schema):
    text = json.dumps(schema)
    names = {part.split('"')[0] for part in text.split('"#/$defs/')[1:]}
    assert names <= set(schema["$defs"])


SHORT = [
    "model={path: model, dtype: bfloat16, quantization: {load_in_4bit: true}}",
    "tasks={benchmark: standard, order: 2, folder: data, train_rows: 8}",
    "tasks=[{benchmark: trace, folder: data}, {name: b, train: {biography: {people_number: 8}}}]",
    "tasks=[{name: a, train: [{prompt: w1, completion: w2}], metric: {generated: {max_new_tokens: 8, match: normalized}}}]",
    "tasks=[{name: a, train: a.jsonl, metric: mylib:score, methods: [tasl]}]",
    "methods=recadam",
    "methods={ewc: }",
    "methods=[tasl, mylib:Own, {mylib:Own: {strength: 3}}]",
    "methods={recadam: {anneal: none, pull: 1e-2}}",
    "methods=[{replay: {rows: {kept: 8, of: [a]}, ratio: 0.1}}]",
    "methods=[{osft: {preserve: [0.25, 0.5]}}]",
    "sft={learning_rate: 1e-4, stop_if: general/loss_change > 0.1, gauges: {general: g.jsonl, every: 4}}",
    "peft={r: 8, target_modules: all-linear}",
    "peft={peft_type: PROMPT_TUNING, num_virtual_tokens: 8}",
    "peft=null",
    "between_tasks={merge: task-arithmetic}",
    "between_tasks={merge: {function: ties, start: base, options: {density: 0.2, dtype: bfloat16}}}",
    "between_tasks={merge: mylib:mine}",
    "memory={policy: reservoir, capacity: 8}",
    "memory=forbidden",
    "baselines={learning_rates: [x, x/3, 0.1]}",
    "sweep={arms: {plain: {}, mine: {methods: [mofo], peft: null, between_tasks: new_adapter}}, seeds: [0, 1]}",
]  # fmt: skip

WRONG = [
    "modle=x",
    "model={pth: x}",
    "model={path: x, dtype: int8}",
    "tasks=[]",
    "tasks=x",
    "tasks=[{train: a.jsonl}]",
    "tasks=[{name: a, train: a.jsonl, train_rows: 0}]",
    "tasks=[{name: a, train: 3}]",
    "tasks={benchmark: standrad}",
    "tasks={benchmark: standard, odrer: 2}",
    "tasks={benchmark: trace}",
    "tasks=[{name: a, train: a.jsonl, metric: exactmatch}]",
    "tasks=[{name: a, train: a.jsonl, metric: {generated: {tokens: 8}}}]",
    "tasks=[{name: a, train: {biography: {people: 8}}}]",
    "methods=rply",
    "methods=replay",
    "methods=[replay]",
    "methods=7",
    "methods={replay: 3}",
    "methods={replay: {row: x}}",
    "methods={freeze: {bottom: three}}",
    "methods={freeze: {}}",
    "methods={freeze: }",
    "methods={recadam: {anneal: cosine}}",
    "methods=[{replay: {rows: {kept: 8, off: [a]}, ratio: 0.1}}]",
    "sft={learning_rat: 1}",
    "sft={learning_rate: fast}",
    "sft={output_dir: x}",
    "sft=fast",
    "peft=8",
    "peft={rank: 4}",
    "peft={peft_type: PROMPT_TUNING, r: 4}",
    "peft={peft_type: IA3}",
    "between_tasks=stack",
    "between_tasks={merge: nope}",
    "between_tasks={merge: {function: ties, options: {densty: 0.2}}}",
    "memory=all",
    "memory={share: many}",
    "max_minutes=0",
    "evaluation={batch_size: 0}",
    "sweep={seeds: 3}",
    "sweep={orders: [[a]]}",
    "sweep={methods: {mine: [rply]}}",
    "sweep={arms: {mine: {method: []}}}",
]  # fmt: skip


def changed(line):
    return override(copy.deepcopy(SMALL), [line], Where())


@pytest.mark.parametrize("line", SHORT)
def test_every_form_fits(line, fits):
    assert fits(SMALL) and fits(changed(line))


@pytest.mark.parametrize("line", WRONG)
def test_wrong_ones_do_not(line, fits):
    assert not fits(changed(line))


def test_what_the_schema_refuses_the_reader_refuses_too(tmp_path, monkeypatch):
    """The other way round is not so: the reader also sees files, tasks and numbers."""
    monkeypatch.chdir(tmp_path)
    world.make(tmp_path)
    (tmp_path / "t0.jsonl").rename(tmp_path / "a.jsonl")
    read_plan(SMALL)
    # A value or a name that is looked up when rows, methods and scorers are made.
    later = (
        "cosine",
        "three",
        "3}",
        "off:",
        "generated",
        "exactmatch",
        "biography",
        "{merge:",
        "train: 3",
        "methods=7",
    )
    taken = []
    for line in WRONG:
        if not any(word in line for word in later):
            with contextlib.suppress(PlanError, TypeError, ValueError):
                read_plan(changed(line))
                taken.append(line)
    assert taken == []


def test_the_command(tmp_path, monkeypatch, capsys, schema):
    monkeypatch.chdir(tmp_path)
    code, out, _ = typed("schema", capsys)
    assert code == 0 and json.loads(out) == schema
    code, out, _ = typed("schema --out plan.schema.json", capsys)
    assert code == 0 and "# yaml-language-server: $schema=plan.schema.json" in out
    assert json.loads((tmp_path / "plan.schema.json").read_text()) == schema
    assert typed("schema --out plan.schema.json --quiet", capsys)[:2] == (0, "")
