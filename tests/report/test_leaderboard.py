"""The leaderboard: who is ranked with whom, and in which order."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from typer.testing import CliRunner

from hf_continual.cli import app
from hf_continual.report.leaderboard import boards_of, write_leaderboard
from hf_continual.report.read import read_folders
from tests.report import world


def board(*folders):
    boards, missing = boards_of(*read_folders(folders, 0))
    return boards, missing


def test_runs_are_ranked_by_what_they_reached(tmp_path):
    figures = {
        name: world.run(tmp_path / name, keep=keep)["summary"]["overall_performance"]
        for name, keep in (("bad", 0.0), ("good", 1.0), ("middle", 0.6))
    }
    (found,), missing = board(*(tmp_path / name for name in figures))
    arms = found["arms"]
    assert [arm["name"] for arm in arms] == ["good", "middle", "bad"] == sorted(figures, key=figures.get, reverse=True)
    assert [arm["place"] for arm in arms] == [1, 2, 3] and not missing
    assert [arm["figures"]["overall_performance"]["mean"] for arm in arms] == [figures[arm["name"]] for arm in arms]
    assert not arms[0]["level_with_first"] and not arms[2]["level_with_first"]
    assert found["rows"] == [12, 12, 12] and arms[0]["learning_rate"] == 2e-4 and arms[0]["methods"] == []


def test_an_arm_is_level_with_the_first_if_an_interval_says_so(tmp_path):
    for name, learn in (("first", 0.95), ("close", 0.9)):
        world.run(tmp_path / name, learn=learn, keep=1.0, seed=3)
    (found,), _ = board(tmp_path / "first", tmp_path / "close")
    one, two = (arm["figures"]["overall_performance"] for arm in found["arms"])
    overlap = one["interval"][0] <= two["mean"] or two["interval"][1] >= one["mean"]
    assert overlap and found["arms"][1]["level_with_first"]


def test_other_settings_have_their_own_board(tmp_path):
    world.run(tmp_path / "a")
    world.run(tmp_path / "order", ["tickets", "law", "recipes"])
    world.run(tmp_path / "rows", rows=15)
    world.run(tmp_path / "model", model="other-llama")
    found, _ = board(*(tmp_path / name for name in ("a", "order", "rows", "model")))
    assert len(found) == 4 and all(len(one["arms"]) == 1 for one in found)


def test_models_of_the_same_name_are_not_the_same_model(tmp_path):
    for owner in ("me", "you"):
        results = {**world.run(tmp_path / owner), "model": f"{owner}/tiny-llama"}  # ids of the Hub
        (tmp_path / owner / "continual_results.json").write_text(json.dumps(results))
    found, _ = board(tmp_path / "me", tmp_path / "you")
    assert sorted(one["model"] for one in found) == ["me/tiny-llama", "you/tiny-llama"]
    for name in ("one", "other"):  # folders of one name, by their files
        world.run(tmp_path / name)
        plan = json.loads((tmp_path / name / "plan.json").read_text())
        plan["model"]["files"] = {"model.safetensors": name}
        plan["tasks"] = [{**task, "test": {"sha256": "12ab"}} for task in plan["tasks"]]
        (tmp_path / name / "plan.json").write_text(json.dumps(plan))
    found, missing = board(tmp_path / "one", tmp_path / "other")
    assert len(found) == 2 and not missing


def test_seeds_are_one_arm_unless_their_plans_differ(tmp_path):
    values = [world.run(tmp_path / f"x-seed{s}", seed=s)["summary"]["overall_performance"] for s in (0, 1)]
    world.run(tmp_path / "y-seed0")
    world.run(tmp_path / "y-seed1", settings={"learning_rate": 1e-3})
    (found,), _ = board(*(tmp_path / name for name in ("x-seed0", "x-seed1", "y-seed0", "y-seed1")))
    arms = {arm["name"]: arm for arm in found["arms"]}
    assert set(arms) == {"x", "y-seed0", "y-seed1"} and arms["x"]["runs"] == ["x-seed0", "x-seed1"]
    assert arms["x"]["figures"]["overall_performance"]["mean"] == pytest.approx(sum(values) / 2)


def test_results_alone_are_ranked_with_the_folders(tmp_path):
    world.run(tmp_path / "here", keep=0.9)
    world.run(tmp_path / "there", keep=0.1)
    shutil.move(tmp_path / "there" / "continual_results.json", tmp_path / "sent.json")
    (found,), _ = board(tmp_path / "here", tmp_path / "sent.json")
    assert [arm["name"] for arm in found["arms"]] == ["here", "sent"] and found["arms"][1]["methods"] is None
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="other.json holds no results"):
        board(tmp_path / "other.json")


def test_rows_that_are_not_known_to_be_the_same_are_told(tmp_path):
    world.run(tmp_path / "here")
    plan = json.loads((tmp_path / "here" / "plan.json").read_text())
    for task in plan["tasks"]:
        task["test"] = {"source": "x.jsonl", "rows": 12, "sha256": "12ab"}
    (tmp_path / "here" / "plan.json").write_text(json.dumps(plan))
    shutil.copy(tmp_path / "here" / "continual_results.json", tmp_path / "sent.json")
    (found,), missing = board(tmp_path / "here", tmp_path / "sent.json")
    assert len(found["arms"]) == 2 and any("sent: not known to be scored on the same rows" in said for said in missing)


def test_unfinished_runs_are_not_ranked(tmp_path):
    results = world.run(tmp_path / "done")
    results["matrix"]["scores"] = results["matrix"]["scores"][:2]
    (tmp_path / "part.json").write_text(json.dumps(results))
    (found,), missing = board(tmp_path / "done", tmp_path / "part.json")
    assert len(found["arms"]) == 1
    assert missing == ["part is not ranked: it was scored after 2 of its 3 tasks."]
    with pytest.raises(ValueError, match="none of the 1 runs has scores after its last task"):
        write_leaderboard([tmp_path / "part.json"], tmp_path / "b.html")


def test_the_page(tmp_path):
    for i in range(3):
        world.run(tmp_path / f"run{i}", keep=0.2 + 0.3 * i, text="<script>alert(1)</script>")
    out = tmp_path / "board.html"
    ran = CliRunner().invoke(
        app, ["report", "--leaderboard", *(str(tmp_path / f"run{i}") for i in range(3)), "--out", str(out), "--json"]
    )
    assert ran.exit_code == 0, ran.output
    told, page = json.loads(ran.stdout), out.read_text(encoding="utf-8")
    assert [arm["name"] for arm in told["boards"][0]["arms"]] == ["run2", "run1", "run0"]
    assert (tmp_path / "board_figures" / "board-1-frontier.png").is_file() and "peak memory" not in page
    rows = re.findall(r'<th scope="row">(run\d)</th>', page)
    assert rows == ["run2", "run1", "run0"] and "<script>alert" not in page
