"""Plain runs at several learning rates: which are made, who is best, what is said, and where it is shown."""

from __future__ import annotations

import csv
import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from hf_continual import train_stream
from hf_continual.atomic_files import read_json
from hf_continual.best_plain import best_plain, frontier, sentence, verdict_of
from hf_continual.cli import app
from hf_continual.hub.folder_facts import read_facts
from hf_continual.hub.lint import lint_folder
from hf_continual.report.write import write_report
from hf_continual.stream.plan_lines import PlanError
from hf_continual.stream.read_plan import read_plan
from hf_continual.stream.report import results_report
from hf_continual.stream.sweep import members
from tests.stream import world

REPLAY = [{"replay": {"rows": "earlier_tasks", "ratio": 0.3}}]


def arms(plan):
    return {m.arm: m.plan for m in members(*read_plan(plan))}


def test_a_plan_with_baselines_is_a_sweep_of_itself_and_plain_runs(tmp_path):
    plan = world.make(
        tmp_path, methods=REPLAY, memory={"rows": 2}, baselines={"learning_rates": ["x", "x/4", "2x", "1e-3", 3]}
    )
    plan["tasks"][1] |= {"methods": ["recadam"], "sft": {"learning_rate": 1.0, "max_steps": 3}}
    found = arms(plan)
    assert list(found) == ["plan", "plain-0.02", "plain-0.005", "plain-0.04", "plain-0.001", "plain-3"]
    assert found["plan"].methods == REPLAY and found["plan"].tasks[1].sft["learning_rate"] == 1.0
    for name, rate in (("plain-0.02", 0.02), ("plain-0.005", 0.005), ("plain-3", 3.0)):
        arm = found[name]
        assert arm.sft["learning_rate"] == rate and arm.methods is None and arm.memory is None
        assert arm.tasks[1].methods is None and arm.tasks[1].sft == {"max_steps": 3}  # the rate is that of every task
        assert arm.peft == found["plan"].peft and arm.between_tasks == "continue"


def test_baselines_of_a_sweep_leave_out_what_is_there(tmp_path):
    """An arm that is plain at a rate is not trained twice; one with another adapter is something else."""
    sweep = {
        "baselines": {"learning_rates": ["x", "x/2"]},
        "arms": {
            "sequential": {},
            "lora": {"peft": {"r": 2}, "sft": {"learning_rate": 0.01}},
            "replay": {"methods": REPLAY},
        },
    }
    assert list(arms(world.make(tmp_path, sweep=sweep))) == ["sequential", "lora", "replay", "plain-0.01"]
    seeds = {"baselines": {"learning_rates": ["x"]}, "seeds": [0, 1]}
    named = [m.name for m in members(*read_plan(world.make(tmp_path, methods=REPLAY, sweep=seeds)))]
    assert named == ["plan-seed0", "plan-seed1", "plain-0.02-seed0", "plain-0.02-seed1"]
    assert list(arms(world.make(tmp_path, sweep={**seeds, "orders": {"down": ["t1", "t0"]}}))) == ["plan"]


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        (
            ["y/3"],
            "'y/3' is not a learning rate. Give a number, such as 2.0e-4, or a factor of the plan's own rate: x, x/3, 2x",
        ),
        (["x/0"], "'x/0' is not a learning rate"),
        (["x", 0.02], "the learning rate 0.02 is there twice"),
        ([-1.0], "must be above 0"),
        ([], r"there are no learning rates. Give some, such as \[x, x/3, x/10\]"),
        (0.1, "got 0.1"),
    ],
)
def test_rates_that_cannot_be(tmp_path, rates, said):
    with pytest.raises(PlanError, match=said):
        read_plan(world.make(tmp_path, baselines={"learning_rates": rates}))


def test_plans_that_cannot_be(tmp_path):
    both = {"baselines": {"learning_rates": ["x"]}}
    with pytest.raises(PlanError, match="baselines are in the plan and in its sweep. Keep one"):
        read_plan(world.make(tmp_path, sweep=both, **both))
    plan = world.make(tmp_path, **both)
    del plan["sft"]["learning_rate"]
    with pytest.raises(PlanError, match="which it does not set. Say sft: {learning_rate: 2.0e-4}, or give numbers"):
        read_plan(plan)
    with pytest.raises(PlanError, match="unknown key 'rates'. Known are learning_rates"):
        read_plan(world.make(tmp_path, baselines={"rates": []}))
    named = {**both, "arms": {"plain-0.02": {"methods": REPLAY}}}
    with pytest.raises(PlanError, match="an arm 'plain-0.02', which the sweep has already. Rename that one"):
        members(*read_plan(world.make(tmp_path, sweep=named)))


def arm(op, learned, kept, rate=None):
    means = {"overall_performance": op, "learning_accuracy": learned, "backward_transfer": kept}
    figures = {key: {"mean": value} for key, value in means.items()}
    return {"figures": figures} | ({"plain": {"learning_rate": rate}} if rate else {})


def test_the_best_plain_run_and_the_frontier_by_hand():
    found = {
        "fast": arm(0.3, 0.9, -0.6, 1e-3), "slow": arm(0.5, 0.7, -0.2, 1e-4), "slower": arm(0.4, 0.5, -0.2, 1e-5),
        "replay": arm(0.6, 0.8, -0.2), "none": {"figures": {}},
    }  # fmt: skip
    assert best_plain(found, list(found)) == "slow" and best_plain(found, list(found), lower=True) == "fast"
    assert best_plain(found, ["replay"]) is None
    assert frontier(found) == ["fast", "replay"]
    assert frontier(found, lower=True) == ["slower"]  # as losses: 0.5 is the least, and nothing kept more


@pytest.mark.parametrize(
    ("interval", "verdict", "said"),
    [
        ((0.01, 0.2), "better", "better than plain fine-tuning at its best rate"),
        ((-0.01, 0.2), "within", "its gain is within what a learning rate gives"),
        ((-0.3, -0.1), "worse", "worse than plain"),
        (None, "within", "within"),
    ],
)
def test_verdicts(interval, verdict, said):
    test = {"first": "plain-1e-05", "second": "replay", "difference": 0.05, "interval": interval, "learning_rate": 1e-5}
    assert verdict_of(test) == verdict
    text = sentence(test)
    assert (
        text.startswith("replay: +5.0 points against the best plain run (plain-1e-05, learning rate 1e-05)")
        and said in text
    )


def printed(results):
    console = Console(file=io.StringIO(), width=150)
    console.print(results_report(results))
    return console.file.getvalue()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fair")
    sft = {**world.SFT, "save_strategy": "no"}
    plan = world.make(folder, methods=REPLAY, sft=sft, baselines={"learning_rates": ["x", "x/100"]})
    plan["tasks"] = plan["tasks"][:2]
    return folder / "out", train_stream(plan).results


def test_a_sweep_says_what_a_method_is_worth(ran):
    """Results, table, Markdown, CSV and card: each arm against the best plain run, and the frontier."""
    out, found = ran
    assert {n: a.get("plain") for n, a in found["arms"].items()} == {
        "plan": None, "plain-0.02": {"learning_rate": 0.02}, "plain-0.0002": {"learning_rate": 0.0002},
    }  # fmt: skip
    means = {n: a["figures"]["overall_performance"]["mean"] for n, a in found["arms"].items()}
    best = max(("plain-0.02", "plain-0.0002"), key=means.__getitem__)
    tests = {t["second"]: t for t in found["best_plain"]}
    assert set(tests) == set(means) - {best} and all(t["first"] == best for t in tests.values())
    assert tests["plan"]["difference"] == pytest.approx(means["plan"] - means[best])
    assert tests["plan"]["verdict"] == verdict_of(tests["plan"])
    assert found["frontier"] == frontier(found["arms"]) and found["frontier"]
    assert read_json(out / "continual_results.json")["best_plain"] == json.loads(json.dumps(found["best_plain"]))
    text = printed(found)
    assert "against the best plain run" in text and f"{best} (rate " in text and tests["plan"]["verdict"] in text
    assert "learning against retention" in text
    markdown = (out / "sweep.md").read_text()
    assert "## Against the best plain run" in markdown and "| plain-0.0002 | 0.0002 |" in markdown
    rows = {r["arm"]: r for r in csv.DictReader((out / "arms.csv").read_text().splitlines())}
    assert rows["plain-0.02"]["plain_learning_rate"] == "0.02" and rows["plan"]["plain_learning_rate"] == ""
    assert {n for n, r in rows.items() if r["frontier"] == "1"} == set(found["frontier"])


def test_the_card_says_it_and_is_checked(ran):
    out, found = ran
    folder = out / "plan-seed0" / "task-01-t1"
    test = next(t for t in found["best_plain"] if t["second"] == "plan")
    card = (folder / "README.md").read_text()
    assert f"- Of its sweep, {sentence(test)}." in card
    assert read_facts(folder).evaluation.best_plain["first"] == test["first"]
    assert not [f for f in lint_folder(folder) if f.rule == "numbers"]
    (folder / "README.md").write_text(
        card.replace("its gain is within", "its gain is beyond").replace("worse than", "better than")
    )
    assert [f for f in lint_folder(folder) if f.rule == "numbers"]
    (folder / "README.md").write_text(card)


def test_the_report_shows_it(ran, tmp_path):
    out, found = ran
    page = write_report([out], tmp_path / "report.html")
    assert [t["verdict"] for t in page["best_plain"]] == [t["verdict"] for t in found["best_plain"]]
    assert page["frontier"] and page["arms"]["plain-0.02"]["plain"] == {"learning_rate": 0.02}
    text = (tmp_path / "report.html").read_text()
    assert "Against the best plain run" in text and "The thin line joins the plain runs" in text
    alone = write_report(
        [out / "plan-seed0", out / "plain-0.02-seed0", out / "plain-0.0002-seed0"], tmp_path / "alone.html"
    )
    assert {(t["first"], t["second"]) for t in alone["best_plain"]} == {
        (f"{t['first']}-seed0", f"{t['second']}-seed0") for t in found["best_plain"]
    }
    without = write_report([out / "plan-seed0"], tmp_path / "one.html")
    assert without["best_plain"] == []


def test_the_dry_run_lists_the_plain_runs(tmp_path):
    file = world.write(tmp_path, world.make(tmp_path, methods=REPLAY, baselines={"learning_rates": ["x", "x/3"]}))
    done = CliRunner().invoke(app, ["run", str(file), "--dry-run", "--json"])
    assert [run["name"] for run in json.loads(done.stdout)["runs"]] == [
        "plan-seed0",
        "plain-0.02-seed0",
        "plain-0.00667-seed0",
    ]
