"""Folders of every kind, finished and not, whole and damaged; and the command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from hf_continual.atomic_files import write_json, write_lines
from hf_continual.cli import app
from hf_continual.report.changed import find_changes
from hf_continual.report.read import read_folders
from hf_continual.report.run import Run, Stage
from hf_continual.report.write import write_report
from tests.report import world
from tests.report.pages import Page


def test_what_changed_worked_by_hand(tmp_path):
    """Rows: kept, lost, regained, never right, learned late; lost again after it came back."""
    paths = ["0111", "0110", "0101", "0000", "0001", "1010"]
    for i, stage in enumerate(("base", "task-00-a", "task-01-b", "task-02-c")):
        write_lines(tmp_path / "predictions" / f"{stage}.a.jsonl", [
            {"row_id": r, "prompt_hash": str(r), "prompt": f"q{r}", "reference": "x", "score": float(path[i]), "prediction": f"{stage} says {r}"}
            for r, path in enumerate(paths)
        ])  # fmt: skip
    run = Run("r", tmp_path, "run", tasks=["a"])
    run.stages = [
        Stage(n, s, tmp_path, i)
        for i, (n, s) in enumerate((("base model", "base"), ("a", "task-00-a"), ("b", "task-01-b"), ("c", "task-02-c")))
    ]
    found = find_changes(run, tmp_path, 10)
    assert found.counts == {"a": {"rows": 6, "kept": 2, "lost": 2, "regained": 1, "never": 1}}
    assert [(c.row, c.kind) for c in found.shown] == [(1, "lost"), (5, "lost"), (2, "regained")]
    lost, twice, regained = found.shown
    assert lost.said == (("b", "task-01-b says 1"), ("c", "task-02-c says 1")) and lost.prompt == "q1"
    assert twice.said == (("b", "task-01-b says 5"), ("c", "task-02-c says 5"))
    assert regained.said == (("a", "task-00-a says 2"), ("b", "task-01-b says 2"), ("c", "task-02-c says 2"))
    assert [right for _, right in regained.path] == [False, True, False, True]
    assert len(find_changes(run, tmp_path, 1).shown) == 1 and find_changes(run, tmp_path, 0).counts == found.counts


def test_graded_scores_count_from_a_half(tmp_path):
    for stage, scores in (("task-00-a", [0.9, 0.4]), ("task-01-b", [0.3, 0.6])):
        write_lines(
            tmp_path / "predictions" / f"{stage}.a.jsonl",
            [{"prompt_hash": str(i), "reference": "x", "score": s} for i, s in enumerate(scores)],
        )
    run = Run(
        "r",
        tmp_path,
        "run",
        tasks=["a"],
        stages=[Stage("a", "task-00-a", tmp_path, 1), Stage("b", "task-01-b", tmp_path, 2)],
    )
    found = find_changes(run, tmp_path, 5)
    assert found.counts["a"] == {"rows": 2, "kept": 1, "lost": 1, "regained": 0, "never": 0} and found.graded == ["a"]


def test_a_trained_folder(tmp_path):
    told = world.trained(tmp_path / "out")
    found = write_report([tmp_path / "out"], tmp_path / "out.html")
    page, (run,) = Page(tmp_path / "out.html"), found["runs"]
    assert run["matrix"] == {"scores": [[told["after"]["value"]]], "base": [told["before"]["value"]]}
    assert run["predictions"] == {"rows": 8, "kept": 7, "lost": 1, "regained": 0, "never": 0}
    assert run["cost"][0]["seconds"] == 12.5 and "12.5" in page.text
    assert "it needs a run that has learned two tasks" in page.text
    world.trained(tmp_path / "bare", test_rows=False)
    bare = write_report([tmp_path / "bare"], tmp_path / "bare.html")
    assert (
        any("train with --test ROWS.jsonl" in m for m in bare["missing"])
        and Page(tmp_path / "bare.html").tags["svg"] == 0
    )


def test_the_demos_folder(tmp_path):
    world.demo(tmp_path / "demo-out")
    found = write_report([tmp_path / "demo-out"], tmp_path / "out.html", figures=tmp_path / "pictures")
    assert [run["name"] for run in found["runs"]] == ["sequential", "continual"]
    assert {t["task"] for t in found["comparisons"]} == {"birth city", "field of study", "employer", "overall"}
    names = {p.stem for p in (tmp_path / "pictures").iterdir()}
    assert {"gauges", "training-1", "training-2", "forgetting", "frontier"} <= names
    assert found["runs"][0]["gauge_changes"]["general text"] == pytest.approx(0.8)


def test_a_run_that_is_not_finished(tmp_path):
    told = world.run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "task-02-recipes")
    (tmp_path / "run" / "continual_results.json").unlink()
    found = write_report([tmp_path / "run"], tmp_path / "out.html")
    assert found["runs"][0]["matrix"]["scores"] == told["matrix"]["scores"][:2]
    assert any("not finished: no folder of 'recipes'" in m for m in found["missing"])


def test_a_run_whose_files_disagree(tmp_path):
    world.run(tmp_path / "run")
    file = tmp_path / "run" / "predictions" / "task-01-tickets.law.jsonl"
    file.write_text(file.read_text(encoding="utf-8").replace('"score": 1.0', '"score": 0.0', 1), encoding="utf-8")
    found = write_report([tmp_path / "run"], tmp_path / "out.html")
    assert any(
        "holds no score that its predictions vouch for" in m and "after 'tickets'" in m for m in found["missing"]
    )
    file.write_text("{cut", encoding="utf-8")
    assert any(
        "predictions on 'law' were left out" in m
        for m in write_report([tmp_path / "run"], tmp_path / "out.html")["missing"]
    )
    data = json.loads((tmp_path / "run" / "continual_results.json").read_text(encoding="utf-8"))
    data["matrix"]["scores"][1][0] = "high"
    write_json(tmp_path / "run" / "continual_results.json", data)
    assert any(
        "matrix was left out: scores[1][0] is 'high'" in m
        for m in write_report([tmp_path / "run"], tmp_path / "out.html")["missing"]
    )


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"step": null, "gauge": "x", "value": 1}', '{"step": 1, "gauge": "x", "value": NaN}']
)
def test_damaged_gauges_do_not_stop_the_page(tmp_path, line):
    world.run(tmp_path / "run")
    (tmp_path / "run" / "task-00-law" / "continual" / "gauges.jsonl").write_text(line + "\n", encoding="utf-8")
    found = write_report([tmp_path / "run"], tmp_path / "out.html")
    assert any(
        "Gauges during training were left out" in m or "No gauges during training" in m for m in found["missing"]
    )


@pytest.mark.parametrize(
    "data",
    [
        {"layers": {"a": 1}},
        {"weights": {"a": ["x"]}},
        {"cosines": {"a": None}},
        {"models": 3, "weights": {"a": [1]}},
        [],
    ],
)
def test_damaged_reports_of_merges_do_not_stop_the_page(tmp_path, data):
    world.run(tmp_path / "run")
    write_json(tmp_path / "run" / "merge_report.json", data)
    assert any(
        "merge_report.json was left out" in m
        for m in write_report([tmp_path / "run"], tmp_path / "out.html")["missing"]
    )


def test_a_sweep_whose_folders_are_gone_shows_what_it_holds(tmp_path):
    told = world.sweep(tmp_path / "sweep", {"plain": 0.3, "replay": 0.9}, seeds=(0,))
    shutil.rmtree(tmp_path / "sweep" / "plain-seed0")
    found = write_report([tmp_path / "sweep"], tmp_path / "out.html")
    run = next(r for r in found["runs"] if r["name"] == "plain-seed0")
    assert run["matrix"]["scores"] == told["runs"]["plain-seed0"]["matrix"]["scores"]
    assert any("plain-seed0 of the sweep is gone" in m for m in found["missing"])


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    for place in ("a", "b"):
        world.run(tmp_path / place / "run")
    names = [run.name for run in read_folders([tmp_path / "a" / "run", tmp_path / "b" / "run"], 5)[0]]
    assert names == ["a/run", "b/run"]


def test_losses_and_scores_do_not_share_a_picture(tmp_path):
    world.run(tmp_path / "scores")
    told = world.run(tmp_path / "losses")
    told["matrix"]["lower_is_better"] = True
    write_json(tmp_path / "losses" / "continual_results.json", told)
    missing = write_report([tmp_path / "scores", tmp_path / "losses"], tmp_path / "out.html")["missing"]
    assert any(m.startswith("losses is measured in losses and scores in scores") for m in missing)


def test_folders_without_results_are_a_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "weights.bin").write_text("x", encoding="utf-8")
    world.run(tmp_path / "above" / "run")
    for name, words in (
        ("empty", "it is empty"),
        ("other", "weights.bin"),
        ("above", "Its folders run hold results: name these"),
    ):
        with pytest.raises(ValueError, match=words):
            write_report([tmp_path / name], tmp_path / "out.html")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write_report([tmp_path / "nowhere"], tmp_path / "out.html")
    with pytest.raises(ValueError, match="no folder is named"):
        write_report([], tmp_path / "out.html")
    with pytest.raises(ValueError, match="predictions=-1 must be 0 or more"):
        write_report([tmp_path / "above" / "run"], tmp_path / "out.html", predictions=-1)


def test_no_path_of_the_machine_and_no_token_is_in_the_page(tmp_path):
    token = "hf_" + "a" * 34
    world.run(tmp_path / "run", settings={"hub_token": token, "note": f"see {token}"})
    write_report([tmp_path / "run"], tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert token not in page and "/home/me" not in page and str(tmp_path) not in page and "tiny-llama" in page


def test_the_command(tmp_path):
    world.run(tmp_path / "run")
    out = tmp_path / "page.html"
    ran = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "--out", str(out), "--json"])
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert found["out"] == str(out) and out.is_file() and (tmp_path / "page_figures" / "matrix-1.png").is_file()
    ran = CliRunner().invoke(
        app, ["report", str(tmp_path / "run"), "--out", str(tmp_path / "q.html"), "--quiet", "--no-figures"]
    )
    assert ran.exit_code == 0 and ran.output == "" and not (tmp_path / "q_figures").exists()
    assert "Example: hf-continual report out/plain out/replay" in " ".join(
        CliRunner().invoke(app, ["report", "--help"]).output.split()
    )
    for wrong, words in ((str(tmp_path), "is a folder"), (str(tmp_path / "x.pdf"), "does not end in .html")):
        with pytest.raises(ValueError, match=words):
            CliRunner().invoke(app, ["report", str(tmp_path / "run"), "--out", wrong], catch_exceptions=False)


def test_it_starts_without_torch(tmp_path):
    world.run(tmp_path / "run")
    code = "import sys; from hf_continual.report.write import write_report; write_report([sys.argv[1]], sys.argv[2]); sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "run"), str(tmp_path / "o.html")], check=False
        ).returncode
        == 0
    )


def test_a_real_run(tmp_path):
    from hf_continual import train_stream
    from tests.stream import world as plans

    plan = plans.make(tmp_path)
    plan["tasks"] = plan["tasks"][:2]
    plan["tasks"][1]["curve"] = [0, 2]
    plan["evaluation"] |= {
        "gauges": {"general": {"metric": "general_loss", "rows": str(tmp_path / "general.jsonl")}},
        "solved_at": None,
    }
    told = train_stream(plans.write(tmp_path, plan)).results
    found = write_report([tmp_path / "out"], tmp_path / "out.html", figures=tmp_path / "pictures")
    page = Page(tmp_path / "out.html")
    assert page.numbers("out: numbers") == [told["matrix"]["base"], *told["matrix"]["scores"]]
    assert {"benchmarks.png", "training-1.svg", "matrix-1.svg"} <= {p.name for p in (tmp_path / "pictures").iterdir()}
    assert [entry["steps"] for entry in found["runs"][0]["cost"]] == [6.0, 6.0]
    assert found["runs"][0]["predictions"]["rows"] == 16
