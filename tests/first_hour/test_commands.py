"""train, score, chat, --set, --json, and starting from an adapter, as typed."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_continual
from hf_continual import ContinualConfig, ContinualTrainer, Method
from hf_continual.commands.words import in_flags
from hf_continual.methods.table import TABLE, method_class
from hf_continual.option_names import LORA_CONFIG, SFT_CONFIG, option_names
from tests import toy
from tests.first_hour import typed

SETTINGS = "--set learning_rate=0.02 --set per_device_train_batch_size=4 --set gradient_checkpointing=false --set use_cpu=true --set bf16=false"


@pytest.fixture(scope="module")
def furnished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("furnished")
    typed.furnish(folder)
    return folder


@pytest.fixture
def here(furnished, monkeypatch):
    monkeypatch.chdir(furnished)
    return furnished


def ran(line, capsys):
    code, out, err = typed.typed(line, capsys)
    assert code == 0, err
    return out


def weights(folder):
    return toy.flat(AutoModelForCausalLM.from_pretrained(folder))


def test_train_score_and_chat(here, capsys):
    line = f"train --model model --train t0.jsonl --test t0.jsonl --out trained --steps 3 --methods '{{replay: {{rows: t1.jsonl, ratio: 0.2}}}}' {SETTINGS}"
    plan = json.loads(ran(f"{line} --dry-run --json", capsys))["runs"][0]
    assert plan["tasks"][0]["steps"] == 3 and plan["tasks"][0]["methods"] == ["replay"] and plan["time"]["seconds"] > 0
    assert not (here / "trained").exists()
    result = json.loads(ran(f"{line} --json --quiet", capsys))
    assert result["kind"] == "model" and result["steps"] == 3 and result["before"]["n"] == result["after"]["n"] == 8
    assert result["after"]["nll"]["value"] < result["before"]["nll"]["value"]
    assert not torch.equal(weights(here / "trained"), weights(here / "model"))
    # The same command again trains nothing; another one is refused.
    assert json.loads(ran(f"{line} --json --quiet", capsys)) == result
    code, _, err = typed.typed(line.replace("0.02", "0.03"), capsys)
    assert code == 2 and "was started with another plan" in err and "0.02 -> 0.03" in err
    scored = json.loads(ran("score trained --test t0.jsonl --json --predictions said.jsonl", capsys))
    assert scored["value"] == result["after"]["value"]
    for key in ("value", "interval"):
        assert scored["nll"][key] == pytest.approx(result["after"]["nll"][key])
    # The same lines as the run itself wrote after training.
    said = (here / "said.jsonl").read_text().splitlines()
    (own,) = (here / "trained" / "predictions").glob("after.*.jsonl")
    assert [json.loads(line) for line in said] == [json.loads(line) for line in own.read_text().splitlines()]
    assert len(said) == 8 and json.loads(said[0])["prompt"]
    assert "exact match" in ran("score trained --test t0.jsonl", capsys)
    said = json.loads(ran("chat trained --prompt 'w1 w2' --max-new-tokens 4 --json", capsys))
    assert said["prompt"] == "w1 w2" and len(said["answer"].split()) <= 4


def test_a_conversation(here, capsys, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("w1 w2\nw3\n\nnot read\n"))
    lines = [json.loads(line) for line in ran("chat model --max-new-tokens 3 --json", capsys).splitlines()]
    assert [line["prompt"] for line in lines] == ["w1 w2", "w3"]


def test_a_recipe_trains_as_it_is(here, capsys):
    result = json.loads(
        ran("train --config recipe.yaml --model model --train t0.jsonl --out by-recipe --json --quiet", capsys)
    )
    assert result["steps"] == 2 and result["methods"][0]["replay"]["rows"] == "t1.jsonl" and result["before"] is None


def test_precision_is_chosen_on_a_machine_without_bf16(tmp_path):
    # Without an accelerator SFTConfig stops: "Your setup doesn't support bf16/gpu".
    if torch.cuda.is_available():
        pytest.skip("there is an accelerator")
    assert ContinualConfig(str(tmp_path)).bf16 is False
    assert ContinualConfig(str(tmp_path), use_cpu=True).bf16 is True  # as SFTConfig
    with pytest.raises(ValueError, match="bf16"):
        ContinualConfig(str(tmp_path), bf16=True)


def test_set_replaces_entries_of_a_plan(here, capsys):
    line = "run plan.yaml --dry-run --json --set steps=5 --set tasks.t1.train=t2.jsonl --set sft.learning_rate=1e-4 --set output=elsewhere"
    run = json.loads(ran(line, capsys))["runs"][0]
    assert [t["steps"] for t in run["tasks"]] == [5, 5, 5] and run["output_dir"] == "elsewhere"
    assert run["tasks"][1]["tokens"] == run["tasks"][2]["tokens"] != run["tasks"][0]["tokens"]
    (here / "other").mkdir()
    for i in range(3):
        toy.rows("prompt_completion", number=4, seed=i).to_json(here / "other" / f"t{i}.jsonl")
    run = json.loads(ran("run plan.yaml --dry-run --json --set data=other", capsys))["runs"][0]
    assert [t["rows"] for t in run["tasks"]] == [4, 4, 4]


def test_a_plan_starts_from_an_adapter(here, capsys):
    first, rank = "tasks=[{name: a, train: t0.jsonl, test: t1.jsonl}]", 2
    run = json.loads(ran("run plan.yaml --dry-run --json --set model=adapter", capsys))["runs"][0]
    assert run["start"].startswith("continuing adapter adapter (r=2) on model, 0 new") and run["model"] == "model"
    for name, options, expected in (
        ("on", "", rank),
        ("stacked", "--set 'peft={r: 3, target_modules: all-linear}'", rank + 3),
        ("merged", "--set model.from_adapter=merge_then_new --set 'peft={r: 3, target_modules: all-linear}'", 3),
    ):
        ran(f"run plan.yaml --json --quiet --set model=adapter --set output={name} --set '{first}' {options}", capsys)
        folder = here / name / "task-00-a"
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == expected, name
    base = json.loads((here / "merged" / "task-00-a" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base) == Path("merged") / "merged-base"
    # The loaded model is the scored one.
    scored = json.loads(ran("score merged --test t1.jsonl --json", capsys))
    cell = json.loads((here / "merged" / "continual_results.json").read_text())["cells"]["a"]["a"]
    assert scored["nll"]["value"] == pytest.approx(cell["nll"]["value"], rel=1e-5)


@pytest.mark.parametrize("way", ["continue", "stack", "merge_then_new"])
def test_the_trainer_starts_from_an_adapter(way, here, tmp_path, capsys):
    """At learning rate 0 the result acts exactly as the adapter did, in each way."""
    lora = None if way == "continue" else LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    for tensor in (adapter := load_file(here / "adapter" / "adapter_model.safetensors")).values():
        assert tensor.shape[0] == 2 or tensor.shape[1] == 2
    trainer = ContinualTrainer(
        "adapter",
        ContinualConfig(**toy.settings(tmp_path / "out", max_steps=1, learning_rate=0.0, from_adapter=way)),
        train_dataset=toy.rows("prompt_completion", number=4),
        peft_config=lora,
    )
    said = capsys.readouterr().err
    assert {
        "continue": "continuing adapter adapter (r=2) on model, 0 new",
        "stack": "rank 5",
        "merge_then_new": "merged-base",
    }[way] in said
    trainer.train()
    trainer.save_model()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = AutoPeftModelForCausalLM.from_pretrained("adapter")(ids).logits
        after = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    assert adapter


def test_an_own_method_next_to_the_plan_needs_no_paper(here, capsys):
    out = ran(
        "run plan.yaml --json --quiet --set output=own --set 'methods=[\"mylib:Own\"]' --set 'tasks=[{name: a, train: t0.jsonl, test: t0.jsonl}]'",
        capsys,
    )
    assert json.loads(out)["complete"] and (here / "own" / "task-00-a" / "README.md").is_file()
    assert Method.paper is None


def test_names_of_options_are_those_of_the_classes():
    targets = {SFT_CONFIG: None, LORA_CONFIG: None, **{TABLE[name]: method_class(name) for name in TABLE}}
    for target, cls in targets.items():
        module, _, name = target.partition(":")
        cls = cls or getattr(importlib.import_module(module), name)
        real = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(cls) if f.init}
        assert option_names(target) == real, target
    assert option_names("no_such_package:Class") == {}


def test_errors_are_in_the_words_of_the_command_line():
    flags = {"overwrite", "base", "output-dir"}
    assert (
        in_flags("Say overwrite=True, or give base=, not f(other=True).", flags)
        == "Say --overwrite, or give --base, not f(other=True)."
    )
    assert in_flags("Replay(ratio=2) is wrong; output_dir='x'", flags) == "Replay(ratio=2) is wrong; output_dir='x'"


HEAVY = ("torch", "transformers", "datasets", "trl", "peft", "accelerate", "scipy", "matplotlib")
ENDED = """
import sys
from hf_continual.cli import main
try:
    main()
except SystemExit as ended:
    code = ended.code or 0
print("loaded:", *(name for name in %r if name in sys.modules))
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (["--help"], 0),
        (["merge", "--help"], 0),
        (["run", "gone.yaml"], 2),
        (["run", "plan.yaml", "--set", "sft.learning_rat=1"], 2),
        (["train", "--model", "x", "--train", "gone.jsonl"], 2),
    ],
)
def test_help_and_errors_load_nothing_that_takes_seconds(line, code, here):
    """Why they appear at once; the seconds are measured by tests/benchmarks/startup.py."""
    ran = subprocess.run(
        [sys.executable, "-c", ENDED % (HEAVY,), *line], cwd=here, capture_output=True, text=True, check=False
    )
    assert ran.returncode == code, ran.stderr
    assert ran.stdout.splitlines()[-1] == "loaded:"


def test_a_plan_is_read_without_torch():
    code = "import sys, hf_continual.cli, hf_continual.stream.read_plan; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert hf_continual.__version__


@pytest.mark.parametrize(
    "verb",
    [
        "train",
        "run",
        "score",
        "chat",
        "methods",
        "recommend",
        "merge",
        "push",
        "demo",
        "schema",
        "skill",
        "card check",
        "card render",
    ],
)
def test_every_verb_has_json_quiet_and_an_example(verb):
    import typer

    from hf_continual.cli import app
    from hf_continual.merging.command import command_for

    command = typer.main.get_command(app)
    for word in verb.split():
        command = command.commands[word]
    if verb == "merge":
        command = command_for(None, {})
    words = {w for p in command.params for w in p.opts}
    assert {"--json", "--quiet"} <= words, words
    assert f"Example: hf-continual {verb} " in command.epilog


def test_names_of_methods_alone(capsys):
    from hf_continual.commands.methods import methods
    from hf_continual.methods.table import TABLE

    methods(quiet=True, as_json=False)
    assert capsys.readouterr().out.split() == list(TABLE)


def test_a_bar_shows_only_long_work_and_can_be_switched_off(monkeypatch, capsys):
    from hf_continual import progress

    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "_SHOWN", {"bars": True})
    assert list(progress.over(range(3), "counting", "rows")) == [0, 1, 2]
    assert capsys.readouterr().err == "", "the output is not a terminal"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    list(progress.over(range(3), "counting", "rows"))
    assert "counting" in capsys.readouterr().err
    progress.be_quiet()
    list(progress.over(range(3), "counting", "rows"))
    assert capsys.readouterr().err == ""
