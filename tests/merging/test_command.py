"""`hf-continual merge METHOD`, and merging between the tasks of a plan."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import hf_continual
from hf_continual import merge_linear, train_stream
from hf_continual.cli import app
from hf_continual.merging.command import METHODS, method_among, run_merge
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
        ("della", (a1, a2), ("--epsilon", "0.1", "--density=0.4")),
        ("consensus", (a1, a2), ("--selectivity", "0.3,0.4", "--agree", "1")),
        ("fapm", (a1, a2), ("--scale", "0.5,0.2")),
        ("slerp", (a1, a2), ("--t", "0.4")),
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
        ("slurp", [a1], {}, "there is no merge 'slurp'. Did you mean 'slerp'. The merges are recall, kif, linear"),
        ("ties", [a1, a2], {"alpha": 1.0}, "merge ties does not take --alpha; it takes --density, --scale."),
        ("interpolate", [a1, a2], {"alpha": 1.0}, r"needs one model \(got 2\), --base and --alpha"),
        ("linear", [a1, a2], {"weights": "half"}, "--weights='half': give numbers separated by commas"),
        ("task-arithmetic", [a1, a2], {}, "needs --base"),
    ):
        base = None if method == "task-arithmetic" else str(tmp / "base")
        with pytest.raises(ValueError, match=said):
            run_merge(method, list(map(str, models)), tmp / "out", base, options, {"dry_run": False})


def test_help_shows_the_options_of_the_method(monkeypatch):
    """Its fields, with their docstring's help; without a method, the options of every merge, and no torch."""
    monkeypatch.setenv("COLUMNS", "200")
    shown = run("ties", "--help").output
    assert "--density" in shown and "Fraction of each task vector that is kept." in shown and "2306.01708" in shown
    assert "default: (0.2)" in shown and "default: (1.0)" in shown
    assert "--num-typical" not in shown and "--push-to-hub" in shown
    own = run("--shift", "1", "tests.merging.test_rules:Median", "--help").output
    assert "--shift" in own and "A custom rule." in own
    general = run("--help").output
    assert "--density" not in general and "dare-ties" in general and "METHOD --help shows the options" in general
    code = "import sys\nfrom hf_continual.cli import app\napp(['merge', '--help'], standalone_mode=False)\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "ties a b --densty 0.2",
            "merge ties does not take --densty. Did you mean --density? It takes --density, --scale.",
        ),
        (
            "--densty=0.2 ties a b",
            "merge ties does not take --densty. Did you mean --density? It takes --density, --scale.",
        ),
        ("ties a b --ot x", "merge ties does not take --ot. Did you mean --out? It takes --density, --scale."),
        ("ties a b --alpha 1", "merge ties does not take --alpha; it takes --density, --scale."),
        ("model-stock a --alpha 1", "merge model-stock does not take --alpha; it takes no options of its own."),
        ("--density 0.2 --config gone.yaml", "gone.yaml does not exist"),
        ("--densty 0.2", "--densty is not an option of every merge. Name the METHOD that has it."),
        ("kif a b c --out x --base d", "merge kif needs 1 to 2 models (got 3) and --base."),
        ("kif a --out x", "merge kif needs --base. The base is the model"),
        ("ties a b", "a merge needs METHOD, MODELS and --out"),
    ],
)
def test_what_the_command_refuses(words, said):
    done = run(*words.split())
    assert done.exit_code and said in str(done.exception)


def test_a_method_is_found_wherever_it_stands():
    for words, method in (
        ("ties a b", "ties"),
        ("--out ties dare-ties a b", "dare-ties"),
        ("--density 0.2 --overwrite dare_ties a b --seed 3", "dare_ties"),
        ("--out=ties --base linear slerp a b", "slerp"),
        ("--shift 2 my.rules:Median a", "my.rules:Median"),
        ("--shift 2 a b", "a"),
        ("--set density=0.1 --public --dtype ties dare a b", "dare"),
        ("--density 0.2", None),
    ):
        assert method_among(words.split()) == method, words


def test_words_become_what_a_field_takes():
    """Each by hand: the word of a command line, and the value that the method gets."""
    for method, name, word, value in (
        ("linear", "weights", "0.7,0.3", [0.7, 0.3]),
        ("linear", "weights", "1", [1.0]),
        ("linear", "weights", [0.5, 0.5], [0.5, 0.5]),
        ("task_arithmetic", "scale", "0.5", 0.5),
        ("task_arithmetic", "scale", "0.5,-0.2", [0.5, -0.2]),
        ("ties", "scale", "1e-1", 0.1),
        ("recall", "anchor", "-1", -1),
        ("recall", "anchor", "m1", "m1"),
        ("recall", "bandwidth", "dim", "dim"),
        ("recall", "bandwidth", "2.5", 2.5),
        ("recall", "include_base", False, False),
        ("recall", "weights", '{"default": [0.5, 0.5]}', {"default": [0.5, 0.5]}),
        ("recall", "weights", "out/recall_report.json", "out/recall_report.json"),
        ("kif", "importance", "new.safetensors,old.safetensors", ("new.safetensors", "old.safetensors")),
        ("kif", "importance", "run/checkpoint-3", "run/checkpoint-3"),
        ("kif", "calibration_new", "rows.jsonl", "rows.jsonl"),
        ("dare", "seed", "3", 3),
    ):
        assert options_of(method)[name].read(word) == value, (method, name, word)
    with pytest.raises(ValueError, match="--seed='x': give a number"):
        options_of("dare")["seed"].read("x")


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
        assert [m["name"] for m in told["models"]][1:] in (["task-00-t0", "trained"], ["trained", "task-00-t0"])


def test_a_warning_is_a_sentence_without_a_line_of_code(tmp_path):
    save(build(), tmp_path / "a")
    command = [sys.executable, "-m", "hf_continual", "merge", "linear", "a", "--out", "out", "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Warning: a is the only model" in done.stderr and "pipeline.py" not in done.stderr
