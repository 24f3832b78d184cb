"""`hf-continual merge METHOD`, and merging between the tasks of a plan."""

from __future__ import annotations

import inspect
import json

import pytest
from typer.testing import CliRunner

import hf_continual
from hf_continual import merge_linear, train_stream
from hf_continual.cli import app
from hf_continual.merging.command import METHODS, run_merge
from hf_continual.merging.engine.options import Output
from hf_continual.merging.method_options import options_of
from hf_continual.merging.methods.table import MERGES, merge_class
from tests.merging.world import adapter, build, digest, save
from tests.stream.world import make


@pytest.fixture
def world(tmp_path):
    base = build()
    save(base, tmp_path / "base")
    rows = [{"prompt": f"w{i} w{i + 1} w3", "completion": f" w{i + 2} w5"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path, adapter(base, tmp_path / "a1", 1), adapter(base, tmp_path / "a2", 2)


def run(*arguments):
    return CliRunner().invoke(app, ["merge", *map(str, arguments)], catch_exceptions=True)


def test_every_method_runs(world):
    tmp, a1, a2 = world
    base = ("--base", tmp / "base", "--quiet")
    for method, models, options in (
        (
            "recall",
            (a1, a2),
            ("--calibration", tmp / "rows.jsonl", "--num-typical", "4", "--bandwidth", "2.5", "--temperature", "0.5"),
        ),
        ("linear", (a1, a2), ("--weights", "0.7,0.3")),
        ("interpolate", (a1,), ("--alpha", "0.5", "--output", "model", "--dtype", "bfloat16")),
        ("task-arithmetic", (a1, a2), ("--scale", "0.5,-0.2", "--adapter-rank", "3")),
        ("ties", (a1, a2), ("--density", "0.3")),
        ("magnitude-max", (a1, a2), ()),
        ("dare", (a1, a2), ("--set", "density=0.2", "--set", "scale=[0.5, 0.1]")),
        ("dare-ties", (a1, a2), ("--density", "0.2", "--seed", "3")),
        ("breadcrumbs", (a1, a2), ("--set", "outliers=0.05")),
        ("slerp", (a1, a2), ("--set", "t=0.4")),
        ("model-stock", (a1, a2), ()),
    ):
        done = run(method, *models, "--out", tmp / method, *base, *options)
        assert done.exit_code == 0, (method, done.output, done.exception)
        assert f"in {tmp / method}" in done.output.replace("\n", "")
    # kif needs models that went on from one: tests/merging/test_kif_fuse.py.
    assert set(METHODS) - {"kif"} == {p.name for p in tmp.iterdir()} - {"base", "a1", "a2", "rows.jsonl"}
    merge_linear([a1, a2], tmp / "same", base=tmp / "base", weights=[0.7, 0.3])
    assert digest(tmp / "same") == digest(tmp / "linear")
    report = json.loads((tmp / "recall" / "recall_report.json").read_text())
    assert (report["options"]["bandwidth"], report["options"]["temperature"]) == (2.5, 0.5)
    again = run("recall", a1, a2, "--out", tmp / "again", *base, "--weights", tmp / "recall" / "recall_report.json")
    assert again.exit_code == 0 and digest(tmp / "again") == digest(tmp / "recall")
    dry = run("ties", a1, a2, "--out", tmp / "dry", *base, "--dry-run")
    assert dry.exit_code == 0 and "all passed" in dry.output and not (tmp / "dry").exists()


def test_wrong_calls_say_what_is_right(world):
    tmp, a1, a2 = world
    for method, models, options, said in (
        ("slurp", [a1], {}, "there is no merge 'slurp'. Did you mean 'slerp'. There are recall, kif, linear"),
        ("ties", [a1, a2], {"alpha": 1.0}, "merge ties does not take --alpha; it takes --density, --scale."),
        ("interpolate", [a1, a2], {"alpha": 1.0}, r"needs one model \(got 2\), --base and --alpha"),
        ("linear", [a1, a2], {"weights": "half"}, "--weights='half': give numbers separated by commas"),
        ("task-arithmetic", [a1, a2], {}, "needs --base"),
    ):
        base = None if method == "task-arithmetic" else str(tmp / "base")
        with pytest.raises(ValueError, match=said):
            run_merge(method, list(map(str, models)), tmp / "out", base, options, {"dry_run": False})


def test_a_function_takes_what_its_method_takes():
    """Each public function is its method: the same options with the same defaults."""
    named = {"linear": "merge_linear", "recall": "merge_with_recall", "kif": "kif_fuse"}
    for name in MERGES:
        function = getattr(hf_continual, named.get(name, name), None)
        if function is None:
            continue
        parameters = inspect.signature(function).parameters
        assert any(p.kind is p.VAR_KEYWORD for p in parameters.values()), name
        own = {p: q.default for p, q in parameters.items() if q.kind is q.KEYWORD_ONLY and p not in ("base", "old")}
        fields = merge_class(name).__dataclass_fields__
        assert set(own) == set(options_of(name)) and not set(own) & set(Output.__dataclass_fields__), name
        assert all(default in (fields[p].default, inspect.Parameter.empty) for p, default in own.items()), name


def test_between_the_tasks_of_a_plan(tmp_path):
    """A plan's merge calls the function with folders, base and the task's rows; joint from the base, and running."""
    options = {"num_typical": 3, "progress": False}
    peft = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    for start in ("base", "merged"):
        name = "hf_continual:merge_with_recall" if start == "base" else "recall"
        merge = {"merge": {"function": name, "start": start, "options": options}}
        plan = make(tmp_path, peft=peft, between_tasks=merge, output_dir=str(tmp_path / start))
        plan["evaluation"] = {"base": False, "bootstrap": 0}
        plan["tasks"] = [{k: v for k, v in task.items() if k != "test"} for task in plan["tasks"]]
        train_stream(plan)
        config = json.loads((tmp_path / start / "task-02-t2" / "adapter_config.json").read_text())
        report = json.loads((tmp_path / start / "task-02-t2" / "recall_report.json").read_text())
        assert report["mode"] == ("joint" if start == "base" else "running")
        assert len(report["weights"]["embed"]) == (3 if start == "base" else 2) and config["r"] in (12, 16, 8)


def test_full_models_of_a_plan(tmp_path):
    old = {"calibration_old": [{"text": "w1 w2 w3"}]}
    for name, options, report in (
        ("hf_continual:merge_linear", {}, "merge_report.json"),
        ("kif", old, "kif_report.json"),
    ):
        merge = {"merge": {"function": name, "options": options}}
        plan = make(tmp_path, between_tasks=merge, output_dir=str(tmp_path / report))
        plan["evaluation"] = {"base": False, "bootstrap": 0}
        plan["tasks"] = [{k: v for k, v in task.items() if k != "test"} for task in plan["tasks"][:2]]
        train_stream(plan)
        told = json.loads((tmp_path / report / "task-01-t1" / report).read_text())
        assert [m["name"] for m in told["models"]] == [
            "model",
            "trained" if name == "kif" else "task-00-t0",
            "task-00-t0" if name == "kif" else "trained",
        ]
