"""The skill file for agents: it is in the package, and every command in it is typed as written, in its order."""

from __future__ import annotations

import json
import re
import shlex
from importlib import resources

import pytest
import yaml

from tests import toy
from tests.first_hour.typed import typed

TEXT = (resources.files("hf_continual") / "skill" / "SKILL.md").read_text(encoding="utf-8")
(PLAN,) = re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.S | re.M)
LINES = [line for block in re.findall(r"^```bash\n(.*?)^```$", TEXT, re.S | re.M) for line in block.splitlines()]
# A model that is not trained: what `card check` finds, and what cannot be told from so few rows.
CODES = {"gate": (0, 2, 4), "card check": (0, 2)}


def test_what_an_agent_reads_first():
    _, head, _ = TEXT.split("---\n", 2)
    said = yaml.safe_load(head)
    assert set(said) == {"name", "description"} and said["name"] == "hf-continual" and len(said["description"]) < 1024


def test_the_command_prints_it(capsys):
    assert typed("skill", capsys)[:2] == (0, TEXT)
    code, out, _ = typed("skill --path", capsys)
    assert code == 0 and out.strip().endswith("SKILL.md")
    assert json.loads(typed("skill --json", capsys)[1]) == {"path": out.strip(), "text": TEXT}


def test_every_step_is_in_it():
    verbs = {line.split()[1] for line in LINES}
    steps = {
        "recommend",
        "methods",
        "schema",
        "run",
        "report",
        "score",
        "chat",
        "gate",
        "diagnose",
        "merge",
        "card",
        "push",
    }
    assert verbs == steps and all(line.startswith("hf-continual ") for line in LINES)
    for option in ("--dry-run", "--choose", "--only", "--json"):
        assert any(option in line for line in LINES)


@pytest.mark.parametrize("line", [line for line in LINES if " merge " not in line])
def test_every_option_exists(line):
    from typer.main import get_command

    from hf_continual.cli import app

    command, words = get_command(app), shlex.split(line.partition(" > ")[0])[1:]
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]  # pyrefly: ignore[missing-attribute]
    command.make_context(command.name, words).close()


@pytest.mark.slow
@pytest.mark.timeout(1200)  # four runs and a diagnosis
def test_every_command_in_its_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    toy.model().save_pretrained("model")
    toy.tokenizer().save_pretrained("model")
    for seed, name in enumerate(("law", "tax")):
        for split in ("train", "test"):
            toy.rows("prompt_completion", number=16, seed=seed).to_json(f"{name}.{split}.jsonl")
    plan = yaml.safe_load(PLAN)
    small = {"max_steps": 1, "save_strategy": "no", "gradient_checkpointing": False, "use_cpu": True, "bf16": False}
    plan["sft"] |= {**small, "dataloader_pin_memory": False}
    plan["peft"]["r"] = 2
    plan["evaluation"] = {"bootstrap": 20}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    for line in LINES:
        words, _, file = line.removeprefix("hf-continual ").partition(" > ")
        if words.startswith("push "):
            continue  # needs the Hub; tests/hub pushes
        code, out, err = typed(words, capsys)
        allowed = next((codes for verb, codes in CODES.items() if words.startswith(verb)), (0,))
        assert code in allowed, (line, err)
        if "--json" in words:
            assert json.loads(out)
        if file:
            (tmp_path / file).write_text(out, encoding="utf-8")
    assert (tmp_path / "merged" / "adapter_model.safetensors").is_file() and (tmp_path / "report.html").is_file()
