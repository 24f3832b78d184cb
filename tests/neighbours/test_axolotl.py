"""The plugin in axolotl itself, where it is installed: `axolotl train` on a tiny model, two tasks, resumed, and inert at zero strength."""

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
from hf_continual.neighbours import axolotl as plugin
from tests import toy

ROOT = Path(__file__).parents[2]
INSTALLED = importlib.util.find_spec("axolotl") is not None
real = pytest.mark.skipif(
    not INSTALLED, reason="axolotl is not installed: it pins older versions, see recipes/neighbours"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("axolotl")
    toy.model().save_pretrained(folder / "base")
    toy.tokenizer().save_pretrained(folder / "base")
    for name, seed in (("one", 1), ("two", 5)):
        rows = [
            {"instruction": a, "input": "", "output": b}
            for a, b in zip(toy.rows(seed=seed)["text"], toy.rows(seed=seed + 10)["text"], strict=True)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(place, name, base, rows="two", continual=None, **more):
    """`axolotl train` in a process of its own."""
    config = {
        "base_model": str(base), "output_dir": str(place / name), "datasets": [{"path": str(place / f"{rows}.jsonl"), "type": "alpaca"}],
        "dataset_prepared_path": str(place / "prepared" / name), "sequence_len": 64, "micro_batch_size": 2, "max_steps": 4,
        "gradient_accumulation_steps": 2, "optimizer": "adamw_torch", "learning_rate": 1e-3, "lr_scheduler": "linear", "bf16": False,
        "fp16": False, "tf32": False, "attn_implementation": "eager", "logging_steps": 1, "save_steps": 2, "val_set_size": 0, "seed": 0,
        "special_tokens": {"pad_token": "<pad>", "eos_token": "<eos>"}, "use_tensorboard": False, "gradient_checkpointing": False,
        **more,
    }  # fmt: skip
    if continual is not None:
        config |= {"plugins": ["hf_continual.neighbours.axolotl.ContinualPlugin"], "continual": continual}
    (place / f"{name}.yaml").write_text(yaml.safe_dump(config))
    variables = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "AXOLOTL_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "axolotl.cli.train", str(place / f"{name}.yaml")], cwd=place, env=variables,
        capture_output=True, text=True, timeout=280, check=False,
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
    resumed = train(
        place, "second", place / "first", "two", second, resume_from_checkpoint=str(place / "second" / "checkpoint-2")
    )
    trained(resumed)
    again = weights(place / "second")
    assert all(torch.equal(after[name], again[name]) for name in after)
    trained(train(place, "plain", place / "first"))
    inert = {"methods": [{"freeze": {"bottom": 1, "from_task": 1}}, {"ewc": {"weight": 0.0}}, {"migu": {"share": 1.0}}]}
    trained(train(place, "inert", place / "first", continual=inert))
    plain, ours = weights(place / "plain"), weights(place / "inert")
    assert all(torch.equal(plain[name], ours[name]) for name in plain) and not torch.equal(
        plain["lm_head.weight"], before["lm_head.weight"]
    )


@real
@pytest.mark.exhaustive
def test_a_typo_fails_before_the_model_is_loaded(place):
    done = train(place, "typo", place / "gone", continual={"methods": {"ewcc": {}}})
    assert done.returncode != 0 and "Did you mean 'ewc'" in done.stdout + done.stderr


@pytest.mark.skipif(INSTALLED, reason="axolotl is installed")
def test_without_axolotl_it_says_so():
    with pytest.raises(
        ImportError, match=r"plugin of axolotl, .*: pip install axolotl\. Without axolotl, ContinualCallback"
    ):
        plugin.ContinualPlugin  # noqa: B018
    with pytest.raises(AttributeError, match="it offers ContinualArgs, ContinualPlugin"):
        plugin.Nothing  # noqa: B018


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"methods": {"ewc": {"wieght": 1}}}, "Did you mean 'weight'"),
        (
            {"methods": "entropy_weighted"},
            "EntropyWeighted on a trainer with ContinualCallback: it reads the loss of each token",
        ),
        ({"methods": "ewc", "task": "law"}, "Extra inputs are not permitted"),
        ({"methods": "ewc", "task_index": -1}, "task_index=-1 must be"),
        ({"methods": [{"freeze": {"bottom": "one"}}]}, "methods.freeze.bottom is 'one'"),
        ({}, "Field required"),
    ],
)
def test_wrong_keys_are_refused_as_the_yaml_is_read(given, said):
    with pytest.raises(ValueError, match=said):
        plugin.ContinualArgs(continual=given)
