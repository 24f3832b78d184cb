"""The recipe in LLaMA-Factory itself, where it is installed: two tasks, resumed, and inert at zero strength."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from tests.neighbours.two_tasks import check_two_tasks, in_a_process, write_base

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "neighbours" / "llamafactory_train.py"
INSTALLED = importlib.util.find_spec("llamafactory") is not None
real = pytest.mark.skipif(
    not INSTALLED, reason="LLaMA-Factory is not installed: it pins older versions, see recipes/neighbours"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamafactory")
    write_base(folder)
    columns = {"prompt": "instruction", "response": "output"}
    (folder / "dataset_info.json").write_text(
        json.dumps({name: {"file_name": f"{name}.jsonl", "columns": columns} for name in ("one", "two")})
    )
    return folder


def train(place, name, base, rows="two", continual=None, **more):
    """In a process of its own: the recipe, or LLaMA-Factory's own command without methods."""
    config = {
        "model_name_or_path": str(base), "stage": "sft", "do_train": True, "finetuning_type": "full", "template": "empty",
        "dataset": rows, "dataset_dir": str(place), "cutoff_len": 64, "output_dir": str(place / name), "overwrite_cache": True,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1,
        "save_steps": 2, "seed": 0, "report_to": "none", "use_cpu": True, "bf16": False, "disable_gradient_checkpointing": True,
        "flash_attn": "disabled", "preprocessing_num_workers": 1, "infer_dtype": "float32", **more,
    }  # fmt: skip
    if continual is not None:
        config["continual"] = continual
    (place / f"{name}.yaml").write_text(yaml.safe_dump(config))
    run = [str(SCRIPT)] if continual is not None else ["-c", "from llamafactory.train.tuner import run_exp; run_exp()"]
    return in_a_process([*run, str(place / f"{name}.yaml")], place, CUDA_VISIBLE_DEVICES="")


@real
@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
def test_two_tasks_resumed_and_inert(place):
    check_two_tasks(train, place)


@real
@pytest.mark.exhaustive
def test_wrong_methods_fail_first(place):
    done = train(place, "typo", place / "gone", continual={"methods": {"ewcc": {}}})
    assert done.returncode != 0 and "Did you mean 'ewc'" in done.stderr
    done = train(place, "none", place / "gone", continual={})
    assert done.returncode == 1 and "has no methods: write them below continual" in done.stderr
