"""Every arm of every preset is a valid plan; runs are taken in order, once; the smoke preset from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.proof.made_up import result

ROOT = Path(__file__).parents[2]
PROOF = ROOT / "recipes" / "proof"
SIBLINGS = ("measure", "plans", "render", "toy", "verdicts")


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(PROOF))
    from recipes.proof import run

    yield run
    for name in SIBLINGS:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    from recipes.proof import toy

    out = tmp_path_factory.mktemp("proof")
    return out, toy.toy_world(out)


@pytest.mark.parametrize("preset", ["cpu", "gpu", "smoke"])
def test_every_arm_is_a_plan(run, world, preset):
    from hf_continual.stream.read_plan import read_plan

    out, model = world
    said = run.read("presets")[preset]
    for part in said["parts"]:
        for arm in {*part["arms"], "comp_text"} - {run.BEST}:
            plan, _ = read_plan(run.build(said, part, arm, out / "data", out, str(model)))
            assert all(Path(t.train).is_file() and Path(t.test).is_file() for t in plan.tasks)
            assert plan.data_seed == (20 if part["use"] == "tuning" else 0)
            assert (part["use"] == "tuning") == (".dev." in str(plan.tasks[0].test))


def test_kif_makes_as_many_optimizer_steps_as_the_others(run, world):
    out, model = world
    cpu = run.read("presets")["cpu"]
    part = next(p for p in cpu["parts"] if p["use"] == "claim")
    plan = run.build(cpu, part, "kif", out / "data", out, str(model))
    arm = plan["sweep"]["arms"]["kif"]
    kif = {"inner_steps": 8, "outer_steps": 4, **arm["methods"][0]["kif"]}
    assert arm["sft"]["max_steps"] * (1 + kif["outer_steps"] / kif["inner_steps"]) == cpu["steps"]
    assert plan["tasks"][0]["sft"]["max_steps"] == cpu["steps"] == plan["sft"]["max_steps"]
    many = run.read("arms")["kif_rounds"]["methods"][0]["kif"]
    assert arm["sft"]["max_steps"] // many["inner_steps"] == 12


def test_prompts_are_shortened_to_instruction_and_end(run):
    from recipes.proof.plans import shortened

    assert shortened("Which?\nabcdef\nAnswer:", 10) == "Which?\nef\nAnswer:"
    assert shortened("one line", 4) == "line" and shortened("Which?\nx", 10) == "Which?\nx"


def test_the_composition_follows_tuning(run, tmp_path):
    parts = run.read("presets")["smoke"]["parts"]

    def arms():
        return [(p["use"], p["data"], a) for p, a, _ in run.open_runs("smoke", parts, tmp_path, None)]

    assert arms()[:3] == [
        ("tuning", "longseq", "sequential"),
        ("tuning", "longseq", "comp_text"),
        ("claim", "longseq", "sequential"),
    ]
    assert ("claim", "longseq", "comp_text") not in arms()
    for arm, old in (("sequential", 3.0), ("comp_text", 1.5)):
        (tmp_path / f"smoke-tuning-longseq-{arm}-seed20.json").write_text(json.dumps(result(arm, 20, old=old)))
    assert arms()[:2] == [("claim", "longseq", "sequential"), ("claim", "longseq", "comp_text")]
    assert [a for *_, a in run.open_runs("smoke", parts, tmp_path, ["kif"])] == [0]


def test_a_run_is_taken_once(run, tmp_path):
    with (
        run.taken(tmp_path / "a.lock") as first,
        run.taken(tmp_path / "a.lock") as second,
        run.taken(tmp_path / "b.lock") as other,
    ):
        assert (first, second, other) == (True, False, True)
    with run.taken(tmp_path / "a.lock") as again:
        assert again


def call(*arguments):
    """A script of the recipe, in a separate process."""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_the_smoke_preset_from_end_to_end(tmp_path):
    done = call("recipes/proof/run.py", "--preset", "smoke", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted((tmp_path / "results").glob("*.json"))
    found = [json.loads(f.read_text()) for f in files]
    assert len(found) == 8 and not [r for r in found if "error" in r]
    assert all(r["cost"]["tokens"] and r["cost"]["seconds"] and r["figures"]["old_loss"] for r in found)
    assert {r["arm"]: r["figures"]["kl"] is not None for r in found if r["data"] == "longseq"} == {
        "sequential": True, "comp_text": True, "kif": True, "average": False, "joint": True,
    }  # fmt: skip
    for source in ([str(tmp_path)], ["--results", str(tmp_path / "results")]):
        again = call("recipes/proof/check.py", *source)
        assert again.returncode == 0 and "8 result files, 0 differences" in again.stdout, again.stdout
    file = tmp_path / "claim-longseq" / "predictions" / "base.amazon.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps({**json.loads(lines[0]), "nll": 9.0}), *lines[1:]]) + "\n")
    changed = call("recipes/proof/check.py", str(tmp_path))
    assert changed.returncode == 1 and "nll_base[1]" in changed.stdout
    resumed = call("recipes/proof/run.py", "--preset", "smoke", "--out", str(tmp_path))
    assert resumed.returncode == 0 and "runs left, " not in resumed.stdout
    published = call("recipes/proof/render.py", "--from", str(tmp_path / "results"))
    assert published.returncode == 1 and "not results" in published.stderr
