"""Sweeps, the dry run and the command line."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_continual import FreezeLayers, Task, train_stream
from hf_continual.atomic_files import read_json
from hf_continual.cli import app
from hf_continual.disk import size
from hf_continual.stream.compare import compare_runs
from hf_continual.stream.cost_report import dry_run_report
from hf_continual.stream.dry_run import describe
from hf_continual.stream.plan_lines import PlanError
from hf_continual.stream.prepare import prepare
from hf_continual.stream.read_plan import read_plan
from tests import toy
from tests.stream import world

ARMS = {"plain": [], "replay": [{"replay": {"rows": "earlier_tasks", "ratio": 0.3}}]}


def test_a_sweep_is_its_runs_side_by_side(tmp_path):
    plan = world.make(
        tmp_path, sweep={"methods": ARMS, "seeds": [0, 1], "orders": {"up": ["t0", "t1"], "down": ["t1", "t0"]}}
    )
    result = train_stream(plan, only="plain-up-seed1")
    out = tmp_path / "out"
    runs = result.results["runs"]
    assert len(runs) == 8 and [n for n, r in runs.items() if r["status"] == "MEASURED"] == ["plain-up-seed1"]
    assert not (out / "continual_results.json").is_file(), "a part is not the whole"
    whole = train_stream(plan).results
    assert read_json(out / "continual_results.json")["arms"].keys() == whole["arms"].keys()
    assert set(whole["arms"]) == {"plain-up", "plain-down", "replay-up", "replay-down"}
    one, two = (whole["runs"][f"plain-down-seed{s}"]["summary"]["overall_performance"] for s in (0, 1))
    figure = whole["arms"]["plain-down"]["figures"]["overall_performance"]
    assert figure["mean"] == pytest.approx((one + two) / 2) and figure["sd"] == pytest.approx(abs(one - two) / 2**0.5)
    assert figure["interval"][0] <= figure["mean"] <= figure["interval"][1]
    # Each arm against the first, order by order; the same rows as in the arms' figures.
    compared = {c["second"]: c for c in whole["comparisons"]}
    assert [(c["first"], c["second"], c["seeds"], c["n"]) for c in whole["comparisons"]] == [
        ("plain-up", "replay-up", [0, 1], 16), ("plain-down", "replay-down", [0, 1], 16),
    ]  # fmt: skip
    gain = whole["arms"]["replay-down"]["figures"]["overall_performance"]["mean"] - figure["mean"]
    assert compared["replay-down"]["difference"] == pytest.approx(gain)
    alike = compare_runs(out / "plain-up-seed0", out / "replay-up-seed0")["overall"]
    runs = {m: whole["runs"][f"{m}-up-seed0"]["summary"]["overall_performance"] for m in ("plain", "replay")}
    assert alike.difference == pytest.approx(runs["replay"] - runs["plain"]) and alike.test == "McNemar, exact"
    assert len((out / "runs.csv").read_text().splitlines()) == 9 and (out / "sweep.png").stat().st_size > 5000
    assert (
        len((out / "arms.csv").read_text().splitlines()) == 5 and "| plain-up | 2 |" in (out / "sweep.md").read_text()
    )
    assert len(list((out / "predictions").glob("base.*"))) == 2 and not list(out.glob("plain*/predictions/base*"))
    alone = {**plan, "sweep": None, "seed": 1, "tasks": plan["tasks"][1::-1], "output_dir": str(tmp_path / "alone")}
    assert train_stream(alone).matrix.scores == whole["runs"]["plain-down-seed1"]["matrix"]["scores"]
    for run in ("plain-down-seed1/task-01-t0", "plain-up-seed1/task-01-t1"):
        assert (out / run / "model.safetensors").is_file()
    assert torch.equal(world.weights(out / "plain-down-seed1/task-01-t0"), world.weights(tmp_path / "alone/task-01-t0"))
    with pytest.raises(PlanError, match="there is no run 'x'; the sweep's are plain-up-seed0"):
        train_stream(plan, only="x")
    with pytest.raises(PlanError, match="the plan has no sweep"):
        train_stream(alone, only="x")


def test_an_arm_changes_more_than_its_methods(tmp_path):
    lora = {"r": 2, "target_modules": ["q_proj"]}
    arms = {
        "plain": {},
        "slow": {"sft": {"learning_rate": 1e-3}},
        "stacked": {"methods": ["o_lora"], "peft": lora, "between_tasks": "new_adapter"},
    }
    plan = world.make(tmp_path, sweep={"arms": arms})
    whole = train_stream(plan).results
    assert list(whole["arms"]) == list(arms) and len(whole["comparisons"]) == 2
    out = tmp_path / "out"
    assert (out / "stacked-seed0/task-02-t2/adapter_config.json").is_file()
    alone = {**plan, "sweep": None, "sft": {**world.SFT, "learning_rate": 1e-3}, "output_dir": str(tmp_path / "alone")}
    train_stream(alone)
    assert torch.equal(world.weights(out / "slow-seed0/task-02-t2"), world.weights(tmp_path / "alone/task-02-t2"))
    assert not torch.equal(world.weights(out / "plain-seed0/task-02-t2"), world.weights(tmp_path / "alone/task-02-t2"))


@pytest.mark.parametrize(
    ("arms", "line", "words"),
    [
        ("{a: {lr: 1}}", 9, r"sweep.arms.a.lr: unknown key 'lr'. .*methods, sft, peft, memory, between_tasks"),
        ("{a: {methods: [ewx]}}", 9, "Unknown method 'ewx'. Did you mean 'ewc'"),
        ("{a: {sft: {learning_rat: 1}}}", 9, "SFTConfig has no option 'learning_rat'. Did you mean 'learning_rate'"),
        ("{a: {sft: {learning_rate: -1.0}}}", 9, "learning_rate"),
        ("{a: {methods: [{replay: {rows: kept, ratio: 0.1}}]}}", 9, "kept rows"),
        ("{a: {between_tasks: join}}", 9, "got 'join'"),
        ("[a, b]", 9, "expected a mapping of arms to their changes, such as {plain: {}"),
        ("{}", 9, "the sweep has no arms"),
        ("{a: {}}\n  methods: {b: []}", 9, "the sweep gives both methods and arms. Keep one"),
    ],
)
def test_mistakes_in_an_arm_are_met_where_they_are_written(tmp_path, arms, line, words):
    from hf_continual.stream.sweep import prepare_sweep

    world.make(tmp_path)
    file = tmp_path / "plan.yaml"
    text = f"""model: {tmp_path}/model
output_dir: {tmp_path}/out
tasks:
- name: t0
  train: {tmp_path}/t0.jsonl
  test: {tmp_path}/t0.jsonl
sft: {{max_steps: 1, use_cpu: true, bf16: false}}
sweep:
  arms: {arms}
"""
    file.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError, match=words) as met:
        prepare_sweep(*read_plan(file))
    assert f"line {line}" in str(met.value)


def test_the_dry_run_is_what_will_be(tmp_path, monkeypatch):
    plan = world.make(
        tmp_path,
        peft={"r": 4, "target_modules": ["q_proj", "v_proj"]},
        methods=[{"freeze": {"bottom": 1}}, {"replay": {"rows": "earlier_tasks", "ratio": 0.25}}],
    )
    plan["sft"] |= {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2}
    del plan["sft"]["max_steps"]
    plan["tasks"][1]["train_rows"] = 5

    def loads(*args, **kwargs):
        raise AssertionError("weights were loaded")

    with monkeypatch.context() as patched:
        patched.setattr(AutoModelForCausalLM, "from_pretrained", loads)
        said = describe(prepare(*read_plan(plan)))
    model = get_peft_model(toy.model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    FreezeLayers(bottom=1).prepare_model(model, Task())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens = [
        sum(
            len(r["prompt"].split()) + len(r["completion"].split()) + 1
            for r in toy.rows("prompt_completion", number=8, seed=i)
        )
        for i in range(3)
    ]
    first, second, third = said["tasks"]
    assert first["trainable"] == trainable and first["tokens"] == tokens[0] and third["tokens"] == tokens[2]
    assert first["parameters"] == sum(p.numel() for p in toy.model().parameters())
    assert (first["replay_share"], second["replay_share"], second["rows"]) == (0.0, 0.25, 5)
    assert said["scored_rows"] == 4 * 3 * 8
    train_stream(plan)
    for i, task in enumerate(said["tasks"]):
        folder = tmp_path / "out" / f"task-0{i}-t{i}"
        assert task["steps"] == read_json(folder / "continual" / "trained.json")["steps"]
        size_on_disk = (folder / "adapter_model.safetensors").stat().st_size
        assert task["disk_bytes"] <= size_on_disk < task["disk_bytes"] + 4096
    assert size(999) == "999 B" and size(1.5e9) == "1.5 GB" and size(2e13) == "20.0 TB" and size(25_300_000) == "25 MB"


def render(report) -> str:
    """A report as text, without wrapped lines."""
    console = Console(file=io.StringIO(), width=400)
    console.print(report)
    return console.file.getvalue()


def test_the_dry_run_says_what_added_rows_take(tmp_path, monkeypatch):
    """Rows that are longer than the task's widen the whole micro-batch: reported before anything is loaded."""

    def said(gere, **sft):
        plan = world.make(tmp_path)
        plan["sft"] |= sft
        plan["methods"] = [{"gere": {"rows": str(tmp_path / "general.jsonl"), **gere}}] if gere else []
        return describe(prepare(*read_plan(plan)))

    plain = said({})
    longest = plain["tasks"][0]["micro_batch"]["tokens"] // 4
    batch = said({"per_batch": 2, "max_length": 100})["tasks"][0]["micro_batch"]
    assert batch == {"task_rows": 4, "added_rows": 2, "tokens": 600}
    assert said({"ratio": 0.1, "max_length": 100})["tasks"][0]["micro_batch"]["tokens"] == 500
    flat = said({"per_batch": 2, "max_length": 100}, padding_free=True, max_length=None)["tasks"][0]["micro_batch"]
    assert flat["tokens"] == 4 * longest + 200
    assert said({"per_batch": 2, "max_length": 100}, max_length=50)["tasks"][0]["micro_batch"]["tokens"] == 300
    grown = said({"per_batch": 60})
    assert grown["memory_bytes"] > 10 * plain["memory_bytes"]
    monkeypatch.setattr("hf_continual.stream.dry_run._memory_here", lambda: 1_000_000)
    text = render(dry_run_report([("", said({"per_batch": 60}))]))
    assert "a micro-batch holds 4 rows of the task and 60 that methods add, about 36,032 tokens with padding" in text
    assert (
        "more memory than the 1.0 MB of this machine: lower per_device_train_batch_size, a method's per_batch" in text
    )
    assert "more memory than" not in render(dry_run_report([("", plain)]))


def test_the_command_line(tmp_path):
    file = world.write(tmp_path, world.make(tmp_path))
    dry = CliRunner().invoke(app, ["run", str(file), "--dry-run"])
    assert dry.exit_code == 0 and "18 steps" in dry.output and not (tmp_path / "out").exists()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    command = [sys.executable, "-m", "hf_continual", "run", str(file), "--quiet"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == 0, done.stderr
    for text in ("(base model)", "backward transfer (BWT)", "95 % interval", "continual_results.json"):
        assert text in done.stdout
    assert "{'" not in done.stdout
    assert (tmp_path / "out" / "matrix.png").stat().st_size > 5000
    data = yaml.safe_load(file.read_text())
    data["tasks"][1]["trian"] = "x"
    world.write(tmp_path, data)
    bad = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], check=False
    )
    assert bad.returncode == 2 and "unknown key 'trian'" in bad.stderr and "Traceback" not in bad.stderr
