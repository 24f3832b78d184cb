"""What a user types, run in this process; and a folder with a tiny model, rows, plans and files that are each broken in one way."""

from __future__ import annotations

import logging
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig, get_peft_model

from hf_continual import cli
from tests import toy
from tests.stream import world


def typed(line: str, capsys: Any) -> tuple[int, str, str]:
    """Run a line as if typed after ``hf-continual``.

    Returns:
        Exit code, standard output, standard error.
    """
    before, path, handlers = sys.argv, list(sys.path), list(logging.getLogger().handlers)
    level = logging.getLogger("hf_continual").level
    sys.argv = ["hf-continual", *shlex.split(line)]
    capsys.readouterr()
    try:
        cli.main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    finally:
        sys.argv, sys.path[:], logging.getLogger().handlers[:] = before, path, handlers
        logging.getLogger("hf_continual").setLevel(level)
    said = capsys.readouterr()
    return code, said.out, said.err


def furnish(folder: Path) -> None:
    """Write every file that the lines use."""
    plan = world.make(folder)
    plan = yaml.safe_load(yaml.safe_dump(plan).replace(f"{folder}/", ""))
    plan["seed"] = 0
    plan["sft"] |= {"max_steps": 2, "save_strategy": "no"}
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False), encoding="utf-8")
    toy.rows("messages", number=6).to_json(folder / "chat.jsonl")
    good = (folder / "t0.jsonl").read_text(encoding="utf-8")
    texts = {
        "broken.jsonl": good + '{"prompt": "w1", "completion\n',
        "empty.jsonl": "",
        "number.jsonl": good + '{"prompt": "w1", "completion": 3}\n',
        "null.jsonl": good + '{"prompt": null, "completion": "w1"}\n',
        "list.jsonl": "[1, 2]\n",
        "columns.jsonl": '{"question": "w1", "answer": "w2"}\n',
        "short.csv": "prompt,completion\nw1,w2\nw3\n",
        "rows.xlsx": "x",
        "afile": "x",
        "empty.yaml": "",
        "list.yaml": "- a\n- b\n",
        "tabs.yaml": "model: model\n\ttasks: []\n",
        "twice.yaml": "model: model\nmodel: model\n",
        "recipe.yaml": "learning_rate: 1.0e-3\nmax_steps: 2\nuse_cpu: true\nmethods: {replay: {rows: t1.jsonl, ratio: 0.2}}\n",
        "wrong_recipe.yaml": "learning_rate: 1.0e-3\nlearning_rat: 1\n",
        "negative_recipe.yaml": "max_steps: 2\nlearning_rate: -1\n",
        "mylib.py": "from hf_continual import Method\n\nclass Own(Method):\n    name = 'own'\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "latin.jsonl").write_bytes('{"prompt": "für", "completion": "w1"}\n'.encode("latin-1"))
    for name in ("nothing", "run/task-00-a", "run/task-01-b"):
        (folder / name).mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT looks for the base from where the test was started
        _save_adapter(folder)


def _save_adapter(folder: Path) -> None:
    model = get_peft_model(toy.model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = "model"
    model.save_pretrained(folder / "adapter")
    toy.tokenizer().save_pretrained(folder / "adapter")
