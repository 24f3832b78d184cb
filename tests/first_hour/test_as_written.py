"""The first snippets and every recipe, typed as written, with a tiny model instead of the real one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests import toy
from tests.first_hour.typed import typed

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = {page.stem: page.read_text(encoding="utf-8") for page in sorted((ROOT / "recipes" / "guide").glob("*.md"))}
RECIPES = [
    # Its 1,500 preliminary steps take 45 seconds even here.
    pytest.param(
        p,
        id=f"{p.parent.name}-{p.stem}",
        marks=pytest.mark.exhaustive if p.parent.name == "gradient_projection" else [],
    )
    for p in sorted((ROOT / "recipes").glob("*/*.yaml"))
    if p.parent.name not in ("accelerate", "baselines", "frontier", "proof", "sequence")
]
LORA = "--peft '{r: 2, target_modules: all-linear}'"


def blocks(text, language):
    """The fenced blocks of a language."""
    return [body for named, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M) if named == language]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy of the sample rows with a tiny model that reads any text."""
    folder = tmp_path_factory.mktemp("recipes")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    reader = toy.tokenizer()
    reader.add_tokens(
        ["__gen__", "__ans__"]
    )  # markers; every other word that it does not know is one and the same to it
    toy.model(vocab_size=len(reader)).save_pretrained(folder / "model")
    reader.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place / "recipes" / "data")
    return place


@pytest.mark.parametrize("page", ["README", "quickstart"])
def test_the_first_snippet(page, here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *before, after = blocks(README if page == "README" else GUIDE[page], "python")
    assert all("SFTTrainer(" in b for b in before) and "ContinualTrainer(" in after and "methods=[Replay" in after
    code = after.replace("Qwen/Qwen2.5-0.5B", str(here / "model")).replace(
        'ContinualConfig("out")',
        'ContinualConfig("out", max_steps=1, report_to="none", disable_tqdm=True, logging_strategy="no", save_strategy="no", dataloader_pin_memory=False)',
    )
    rows = toy.rows("prompt_completion", number=4)
    names = {"new_task": rows, "old_rows": toy.rows("prompt_completion", number=4, seed=3)}
    exec(compile(code, f"{page}.md", "exec"), names)
    assert names["trainer"].state.global_step == 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe(recipe, here, tmp_path, capsys):
    if recipe.stem in ("qlora", "paper", "t5", "llama"):
        pytest.skip("needs a quantised or a large base; tests/test_house.py trains it")
    model = here / "model"
    lora = LORA if recipe.stem == "lora" or recipe.parent.name == "o_lora" else ""
    line = f"train --config ../{recipe.parent.name}/{recipe.name} --model {model} --train new_task.jsonl {lora} --steps 2 --out {tmp_path / 'out'}"
    if recipe.parent.name == "mask_surprising":  # every token surprises a model that is not trained
        line += " --set methods.mask_surprising.threshold=100"
    code, out, err = typed(f"{line} --json --quiet --set save_strategy=no --set dataloader_pin_memory=false", capsys)
    assert code == 0, err
    assert json.loads(out)["steps"] == 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("plan", ["own_tasks", "standard", "memory"])
def test_a_plan(plan, here, tmp_path, capsys):
    data = "" if plan == "own_tasks" else "--set data=longseq"
    line = f"run ../sequence/{plan}.yaml --set model.path={here / 'model'} {data} --set steps=2 --set output={tmp_path / 'out'}"
    if plan == "own_tasks":
        line = line.replace("model.path=", "model=")
    for extra in (
        "--dry-run --json",
        "--json --quiet --set sft.save_strategy=no --set sft.dataloader_pin_memory=false",
    ):
        code, out, err = typed(f"{line} {extra}", capsys)
        assert code == 0, err
        assert json.loads(out)


SWEEP = ROOT / "recipes" / "baselines" / "sweep.yaml"


@pytest.mark.exhaustive
@pytest.mark.parametrize("arm", yaml.safe_load(SWEEP.read_text(encoding="utf-8"))["sweep"]["arms"])
def test_a_system_of_the_papers(arm, here, tmp_path, capsys):
    line = (
        f"run ../baselines/sweep.yaml --only {arm}-seed0 --set model.path={here / 'model'} --set data=longseq --set output={tmp_path / 'out'} "
        f"--set evaluation.gauges.general.rows=longseq/general.heldout.jsonl --set steps=2 --json --quiet "
        f"--set sft.save_strategy=no --set sft.dataloader_pin_memory=false"
    )
    code, out, err = typed(line, capsys)
    assert code == 0, err
    assert json.loads(out)["runs"][f"{arm}-seed0"]["status"] == "MEASURED"


@pytest.mark.exhaustive
def test_the_merges_of_the_guide(here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("law", "tax", "tickets", "seed-0", "seed-1")):
        toy.model(seed).save_pretrained(name)
        toy.tokenizer().save_pretrained(name)
    toy.rows(number=24).to_json("tickets.jsonl")
    merges = [
        line
        for b in blocks(GUIDE["merging"], "")
        for line in b.splitlines()
        if line.startswith("hf-continual merge") and "--config" not in line
    ]
    assert len(merges) >= 2
    for line in merges:
        typed_line = (
            line.removeprefix("hf-continual ").partition("#")[0].replace("Qwen/Qwen2.5-0.5B", str(here / "model"))
        )
        code, _, err = typed(f"{typed_line} --quiet", capsys)
        assert code == 0, (line, err)


def test_a_line_of_the_guide_names_every_verb():
    from typer.main import get_command

    from hf_continual.cli import app

    for verb in get_command(app).commands:  # pyrefly: ignore[missing-attribute]
        assert any(re.search(rf"hf[-_]continual {verb}\b", text) for text in (README, *GUIDE.values())), verb
