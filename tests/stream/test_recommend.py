"""Recommendations: every rule is a valid plan, every measured row is where it says, and facts are read from plans."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from hf_continual.cli import app
from hf_continual.methods.table import TABLE, build_methods
from hf_continual.stream.plan_lines import PlanLoader
from hf_continual.stream.read_plan import read_plan
from hf_continual.stream.recommend import FACTS, as_yaml, changed_plan, changes_of, facts_of, page, recommended, rules
from tests import toy
from tests.stream import world
from tests.stream.choosing import PAGE

ROOT = Path(__file__).parents[2]
CASES = [dict(zip(FACTS, values, strict=True)) for values in itertools.product(*FACTS.values())]
CASES = [case for case in CASES if case["quantized"] == "no" or case["weights"] == "adapter"]


@pytest.fixture
def files(tmp_path):
    world.make(tmp_path)
    return {"OLD": str(tmp_path / "t0.jsonl"), "GENERAL": str(tmp_path / "general.jsonl")}


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.name)
def test_the_measured_row_is_in_the_file(rule):
    """A number that is measured again cannot go stale here: the row must be a line of the file, under its head."""
    lines = (ROOT / rule.measured.file).read_text(encoding="utf-8").splitlines()
    assert rule.measured.head in lines and rule.measured.row in lines
    head, row = lines.index(rule.measured.head), lines.index(rule.measured.row)
    assert head < row and all(line.startswith("|") for line in lines[head:row])  # one table


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.name)
def test_every_snippet_is_a_plan(rule, tmp_path, files):
    """Known methods with known options of the right type, and a plan that is read."""
    assert set(rule.when) <= set(FACTS) and all(set(v) <= set(FACTS[k]) for k, v in rule.when.items())
    assert rule.why.endswith(".") and rule.avoid.endswith(".")
    data = world.make(tmp_path, peft={"r": 2})
    if rule.when.get("tasks") == ["one"]:
        data["tasks"] = data["tasks"][:1]
    if "kept" in rule.when.get("old_rows", ()):
        data["memory"] = {"rows": 2}
    text = as_yaml(changed_plan(data, changes_of(rule, files)))
    assert "OLD" not in text and "GENERAL" not in text
    plan, _ = read_plan(world.write(tmp_path, yaml.load(text, PlanLoader)))
    assert plan.sweep is not None and plan.sweep.baselines is not None
    for method in changes_of(rule, files)["methods"]:
        (name,) = method
        assert name in TABLE
        rows = {k: files["OLD"] for k in ("rows", "memory") if method[name].get(k) in ("earlier_tasks", "kept")}
        assert build_methods({name: {**method[name], **rows}})


@pytest.mark.parametrize("facts", CASES, ids=lambda f: "-".join(f.values()))
def test_every_plan_gets_two_or_three(facts):
    found = recommended(facts)
    assert 2 <= len(found) <= 3 and len({rule.name for rule in found}) == len(found)
    asked = json.dumps([dict(rule.changes) for rule in found])
    assert ("earlier_tasks" in asked) <= (facts["old_rows"] == "all" and facts["tasks"] == "sequence")
    assert ('"kept"' in asked) <= (facts["old_rows"] == "kept")
    assert ("GENERAL" in asked) <= (facts["general_text"] == "yes")
    assert ("OLD" in asked) <= (facts["tasks"] == "one" and facts["old_rows"] == "all")


def test_every_rule_is_recommended_to_someone():
    named = {rule.name for facts in CASES for rule in recommended(facts)}
    assert named == {rule.name for rule in rules()}


def facts(folder, one=False, **changes):
    plan = world.make(folder, **changes)
    plan["tasks"] = plan["tasks"][: 1 if one else 3]
    return facts_of(read_plan(plan)[0])


def test_facts_are_read_from_a_plan(tmp_path, files):
    old, general = files["OLD"], files["GENERAL"]
    plain, named = facts(tmp_path)
    assert plain == {
        "tasks": "sequence", "weights": "full", "quantized": "no", "old_rows": "all", "general_text": "no",
    } and named == {}  # fmt: skip
    assert facts(tmp_path, one=True)[0]["old_rows"] == "none" and facts(tmp_path, one=True)[0]["tasks"] == "one"
    assert facts(tmp_path, memory="forbidden")[0]["old_rows"] == "none"
    assert facts(tmp_path, memory={"rows": 2})[0]["old_rows"] == "kept"
    assert facts(tmp_path, peft={"r": 2})[0]["weights"] == "adapter"
    assert facts(tmp_path, methods=["moe_lora"])[0]["weights"] == "adapter"
    model = {"path": str(tmp_path / "model"), "quantization": {"load_in_4bit": True}}
    assert facts(tmp_path, model=model, peft={"r": 2})[0]["quantized"] == "yes"
    given, named = facts(tmp_path, one=True, methods=[{"replay": {"rows": old, "ratio": 0.1}}])
    assert given["old_rows"] == "all" and named == {"OLD": old}
    given, named = facts(tmp_path, methods={"gere": {"rows": general}})
    assert given["general_text"] == "yes" and named == {"GENERAL": general}
    text = [{"replay": {"rows": general, "row_type": "text", "ratio": 0.1}}]
    assert facts(tmp_path, sweep={"methods": {"a": text}})[0]["general_text"] == "yes"
    assert facts(tmp_path, methods={"gere": {"rows": "self"}})[0]["general_text"] == "no"
    gauge = {"gauges": {"general": {"rows": general, "split": "train"}}}
    assert facts(tmp_path, evaluation=gauge)[0]["general_text"] == "no"  # held out: training on it would spoil it
    plan, _ = read_plan(world.make(tmp_path))
    assert facts_of(plan, old, general)[1] == {"OLD": old, "GENERAL": general}


def test_the_page_is_the_table():
    """`python -m tests.stream.choosing` writes it; the README links it."""
    assert PAGE.read_text(encoding="utf-8") == page()
    assert "(recipes/choosing.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    for rule in rules():
        assert f"[`{rule.name}`](#{rule.name})" in page() and rule.measured.row in page()


def test_the_command(tmp_path, files):
    plan = world.make(tmp_path, peft={"r": 2}, methods=["recadam"], sweep={"seeds": [0, 1]})
    plan["tasks"][0]["methods"] = ["migu"]
    file = world.write(tmp_path, plan)
    run = lambda *more: CliRunner().invoke(app, ["recommend", str(file), *more])  # noqa: E731
    shown = run()
    assert shown.exit_code == 0, shown.output
    for text in (
        "old rows: all",
        "1. replay:",
        "Measured (SmolLM2-135M",
        "| backward transfer | -46 points | -29 points |",
        "baselines:",
    ):
        assert text in shown.output, text
    assert run("--quiet").output.split() == ["replay", "own-text"]
    found = json.loads(run("--json", "--general", files["GENERAL"]).output)
    assert [r["name"] for r in found["recommendations"]] == ["replay-freeze-pull", "replay", "gere"]
    first = found["recommendations"][0]
    assert yaml.load(first["snippet"], PlanLoader) == first["changes"]
    assert "sweep" not in first["plan"] and "methods" not in first["plan"]["tasks"][0]
    whole = run("--choose", "1")
    read, _ = read_plan(yaml.load(whole.output, PlanLoader))
    assert read.methods == [{"replay": {"rows": "earlier_tasks", "ratio": 0.1}}]
    far = run("--choose", "9")
    assert far.exit_code != 0 and "there are 2 recommendations for this plan. Give 1 to 2" in str(far.exception)
    other = run("--quiet", "--set", "memory=forbidden")
    assert other.output.split() == ["kl-to-base", "freeze", "average"]


def test_it_loads_no_torch():
    code = "import sys, hf_continual.stream.recommend as r; r.page(); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_the_dry_run_names_them(tmp_path):
    toy.rows()
    file = world.write(tmp_path, world.make(tmp_path))
    shown = CliRunner().invoke(app, ["run", str(file), "--dry-run"])
    assert "methods for such a plan: replay, own-text" in shown.output
    data = json.loads(CliRunner().invoke(app, ["run", str(file), "--dry-run", "--json"]).stdout)
    assert data["recommended"] == ["replay", "own-text"]
