"""The recipe's arms are equal in steps and rows, a run gives a result file, and the README has the tables of its files."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "kif_rounds"
SIBLINGS = ("arms", "figures", "result_file", "world", "verdicts")


@pytest.fixture
def recipe(monkeypatch):
    """The recipe's modules by name."""
    monkeypatch.syspath_prepend(str(RECIPE.parent / "proof"))
    monkeypatch.syspath_prepend(str(RECIPE))
    import arms
    import figures

    from recipes.kif_rounds import render, run

    yield {"arms": arms, "figures": figures, "render": render, "run": run}
    for name in SIBLINGS:
        sys.modules.pop(name, None)


def test_every_arm_makes_the_same_steps_with_the_same_rows(recipe):
    arms = recipe["arms"]
    for arm, change in {**arms.rate_arms(), **arms.strength_arms(1e-3), **arms.claim_arms(1e-3, 6, 0.5)}.items():
        made = arms.plan(change, 0, Path("model"), Path("out"))
        if made["between_tasks"] == "joint":
            assert made["sft"]["max_steps"] == 4 * 144
            continue
        assert [m for method in made["methods"] for m in method] in ([], ["replay"], ["kif"])
        options = next(iter(made["methods"][0].values())) if made["methods"] else {}
        for i, task in enumerate(made["tasks"]):
            steps, batch = task["sft"]["max_steps"], task["sft"]["per_device_train_batch_size"]
            memory = options.get("per_batch", 0) if i else 0
            outer = steps // 8 * 4 if i and "kif" in arm else 0
            assert steps + outer == (288 if arm.endswith("_24") else 144) and batch + memory == 12, arm
            # With the default share of the batch, mixing also has KIF's number of task rows and of memory rows.
            if i and arm in ("mixed", "kif"):
                assert (steps * batch, steps * memory + 12 * outer) == (96 * 12, 48 * 12), arm


def test_a_task_has_a_clear_answer_and_words_of_its_own(recipe):
    from world import ASPECTS, SHOWN, World

    world = World(3, 48)
    import random

    for aspect in ASPECTS:
        row = world.row(random.Random(0), aspect)
        value = world.labels[aspect].index(row["completion"].strip())
        asked = row["prompt"].split()[2:-1]
        assert len(asked) == SHOWN and sum(word in world.groups[aspect][value] for word in asked) >= 4
    labels = [label for own in world.labels.values() for label in own]
    assert len(set(labels)) == len(labels) == 20


def test_a_small_run_and_its_numbers(recipe, tmp_path):
    (tmp_path / "results").mkdir()
    recipe["run"].run_one(("smoke", "kif", {**recipe["arms"].kif(), "rate": 1e-3}, 0), tmp_path)
    file = tmp_path / "results" / "smoke-kif-seed0.json"
    found = json.loads(file.read_text())
    assert found["arm"] == "kif" and len(found["figures"]["final"]) == 4
    assert sorted(found["rows"]) == ["0", "1", "2", "3"] and sorted(found["rows"]["0"]) == ["taste"]
    assert all(len(found["rows"]["3"][task]["score"]) == 4 for task in found["tasks"])
    assert recipe["figures"].differences(found) == []
    found["rows"]["3"]["taste"]["nll"][0] += 4
    assert [d.split(":")[0] for d in recipe["figures"].differences(found)] == ["old_loss"]
    assert "`kif`" in recipe["render"].tables([{**found, "use": "claim"}])
    assert not list((tmp_path / "smoke").iterdir())


def test_the_choices_follow_from_the_results_of_tuning(recipe, tmp_path):
    run, arms = recipe["run"], recipe["arms"]
    (tmp_path / "results").mkdir()
    # Of each kind the second try is best on average, though not in seed 20.
    best = {"sequential_0.002": "learned", "mixed_4": "op", "kif_0.5": "op"}
    stages = run.stages(tmp_path)
    for _ in range(2):
        for use, name, _, seed in next(stages):
            figures = {"learned": 0.5, "op": 0.5, **({best[name]: 0.4 if seed == 20 else 0.9} if name in best else {})}
            run.file_of(tmp_path, use, name, seed).write_text(json.dumps({"figures": figures}))
    claim = {name: arm for _, name, arm, _ in next(stages)}
    assert {arm["rate"] for arm in claim.values()} == {0.002}
    assert "mixed_tuned" not in claim and claim["kif_tuned"] == {**arms.kif(top_share=0.5), "rate": 0.002}
    run.file_of(tmp_path, "tuning", "mixed_2", 21).unlink()
    assert len(list(run.stages(tmp_path))) == 2  # the claim waits for tuning


def test_the_readme_has_the_tables_of_its_files(recipe):
    assert recipe["render"].check_readme() is None


def test_every_number_of_the_files_is_that_of_their_rows(recipe):
    assert recipe["figures"].main() == 0


def test_a_changed_file_is_found(recipe, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(RECIPE / "results", results)
    readme = tmp_path / "README.md"
    shutil.copy2(RECIPE / "README.md", readme)
    made = {
        "use": "claim", "arm": "mixed", "seed": 77, "tasks": ["a", "b"], "cpu_seconds": 60.0,
        "rows": {
            "0": {"a": {"score": "1111", "nll": [1, 1, 1, 1]}},
            "1": {"a": {"score": "0111", "nll": [2000, 0, 0, 0]}, "b": {"score": "1111", "nll": [1, 1, 1, 1]}, "general": {"loss": [3000], "weight": [1]}},
        },
    }  # fmt: skip
    made["figures"] = recipe["figures"].figures(made["rows"], made["tasks"])
    assert made["figures"]["op"] == 0.875 and made["figures"]["bwt"] == -0.25 and made["figures"]["old_loss"] == 0.5
    (results / "claim-mixed-seed77.json").write_text(json.dumps(made))
    assert "differ: write the tables again" in (recipe["render"].check_readme(readme, results) or "")
