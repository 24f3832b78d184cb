"""The plugin in axolotl itself, where it is installed: `axolotl train` on a tiny model, two tasks, resumed, and inert at zero strength."""

from __future__ import annotations

import importlib.util

import pytest
import yaml

from hf_continual.neighbours import axolotl as plugin
from tests.neighbours.two_tasks import check_two_tasks, in_a_process, write_base

INSTALLED = importlib.util.find_spec("axolotl") is not None
real = pytest.mark.skipif(
    not INSTALLED, reason="axolotl is not installed: it pins older versions, see recipes/neighbours"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("axolotl")
    write_base(folder)
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
    return in_a_process(["-m", "axolotl.cli.train", str(place / f"{name}.yaml")], place, AXOLOTL_DO_NOT_TRACK="1")


@real
@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
def test_two_tasks_resumed_and_inert(place):
    check_two_tasks(train, place)


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
