"""The recipe in LLaMA-Factory itself, where it is installed: two tasks, resumed, and inert at zero strength."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_continual.data import handover
from tests import toy

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "neighbours" / "llamafactory_train.py"
INSTALLED = importlib.util.find_spec("llamafactory") is not None
real = pytest.mark.skipif(
    not INSTALLED, reason="LLaMA-Factory is not installed: it pins older versions, see recipes/neighbours"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamafactory")
    toy.model().save_pretrained(folder / "base")
    toy.tokenizer().save_pretrained(folder / "base")
    columns = {"prompt": "instruction", "response": "output"}
    (folder / "dataset_info.json").write_text(
        json.dumps({name: {"file_name": f"{name}.jsonl", "columns": columns} for name in ("one", "two")})
    )
    for name, seed in (("one", 1), ("two", 5)):
        pairs = zip(toy.rows(seed=seed)["text"], toy.rows(seed=seed + 10)["text"], strict=True)
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"instruction": a, "output": b}) + "\n" for a, b in pairs)
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
    variables = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(
        [sys.executable, "-W", "ignore", *run, str(place / f"{name}.yaml")], cwd=place, env=variables, capture_output=True, text=True,
        timeout=280, check=False,
    )  # fmt: skip


def weights(folder):
    return load_file(folder / "model.safetensors")


def trained(done):
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@real
@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
def test_two_tasks_resumed_and_inert(place):
    methods = [{"freeze": {"bottom": 1}}, {"ewc": {"weight": 1e5}}, {"migu": {"share": 0.3, "first_task": True}}]
    trained(train(place, "first", place / "base", "one", {"methods": methods, "task_name": "one"}))
    found = handover.read(place / "first")
    assert found is not None and found.names == ["ewc", "migu"] and found.task["name"] == "one"
    second = {"methods": [*methods, {"recadam": {"pull": 0.05, "anneal": "none"}}], "task_name": "two", "task_index": 1}
    trained(train(place, "second", place / "first", "two", second))
    assert handover.state_of(handover.read(place / "second"), "ewc")["tasks"] == 2
    before, after = weights(place / "first"), weights(place / "second")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {n for n in before if ".layers.0." in n} <= same and any(".layers.3.mlp" in n for n in before.keys() - same)
    state = json.loads((place / "second" / "checkpoint-4" / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    assert len(logged) == 4 and all(
        entry["recadam/distance"] >= 0 and 0 < entry["freeze/trainable"] < 1 for entry in logged
    )
    trained(
        train(
            place,
            "second",
            place / "first",
            "two",
            second,
            resume_from_checkpoint=str(place / "second" / "checkpoint-2"),
        )
    )
    again = weights(place / "second")
    assert all(torch.equal(after[name], again[name]) for name in after)
    trained(train(place, "plain", place / "first"))
    inert = {"methods": [{"freeze": {"bottom": 1, "from_task": 1}}, {"ewc": {"weight": 0.0}}, {"migu": {"share": 1.0}}]}
    trained(train(place, "inert", place / "first", continual=inert))
    plain, ours = weights(place / "plain"), weights(place / "inert")
    assert all(torch.equal(plain[name], ours[name]) for name in plain)
    assert not all(torch.equal(plain[name], before[name]) for name in plain)


@real
@pytest.mark.exhaustive
def test_wrong_methods_fail_first(place):
    done = train(place, "typo", place / "gone", continual={"methods": {"ewcc": {}}})
    assert done.returncode != 0 and "Did you mean 'ewc'" in done.stderr
    done = train(place, "none", place / "gone", continual={})
    assert done.returncode == 1 and "has no methods: write them below continual" in done.stderr
