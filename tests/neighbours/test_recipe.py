"""What recipes/neighbours shows: every snippet runs, every block of YAML is read, and the table is that of the hooks."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml
from transformers import DataCollatorForSeq2Seq, TrainingArguments

from hf_continual import ContinualCallback
from hf_continual.data import handover
from hf_continual.neighbours.axolotl import ContinualArgs
from hf_continual.trainer.any_trainer import table
from tests import toy
from tests.neighbours import world

FOLDER = Path(__file__).parents[2] / "recipes" / "neighbours"
TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")
PYTHON, YAML = (re.findall(rf"```{kind}\n(.*?)```", TEXT, flags=re.S) for kind in ("python", "yaml"))


@pytest.mark.parametrize("place", range(3))
def test_snippets_run_as_they_stand(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    assert len(PYTHON) == 3
    given = {
        "model": toy.model(), "rows": world.rows(), "collator": DataCollatorForSeq2Seq(toy.tokenizer()),
        "args": TrainingArguments(**toy.settings(tmp_path / "out")), "__name__": "snippet",
    }  # fmt: skip
    exec(PYTHON[place], given)
    assert given["trainer"].state.global_step == 4 and len(given["trainer"].methods) in (1, 3)
    if "save_model" in PYTHON[place]:
        assert handover.read(tmp_path / "out").names


def test_the_yaml_is_read_as_it_stands():
    axolotl, factory = (yaml.safe_load(block) for block in YAML)
    settings = ContinualArgs(continual=axolotl["continual"]).continual
    assert settings.task_index == 1 and axolotl["plugins"] == ["hf_continual.neighbours.axolotl.ContinualPlugin"]
    assert [m.name for m in ContinualCallback(**factory["continual"]).methods] == ["freeze", "recadam"]


def test_the_script_is_what_the_readme_says():
    tree = ast.parse((FOLDER / "llamafactory_train.py").read_text(encoding="utf-8"))
    called = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert "run_exp(config, callbacks=[ContinualCallback(**settings)])" in called
    shown = yaml.safe_load(ast.get_docstring(tree).split("config.yaml\n\n")[-1].split("\n\nThe other")[0])
    ContinualCallback(**shown["continual"])


def test_the_table_is_that_of_the_hooks():
    shown = re.search(r"\| method \| hooks .*?(?=\n\n)", TEXT, flags=re.S)
    assert shown and shown.group(0).splitlines() == table()
