"""What every method of the table must keep, alone and in pairs. A new method is found here by itself.

Each method's test file `tests/methods/test_NAME.py` offers `example(world)`, `zero(world)` and `ZERO_TOLERANCE`.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from trl import SFTConfig, SFTTrainer

from hf_continual import ContinualConfig, ContinualTrainer
from hf_continual.methods.compose import Methods
from hf_continual.methods.table import TABLE, build_methods, method_class
from hf_continual.paper import Paper
from tests import toy
from tests.methods import children

ROOT = Path(__file__).parents[2]
PAIRS = [pair for pair in itertools.combinations(TABLE, 2)]


def module(name):
    return importlib.import_module(f"tests.methods.test_{name}")


def build(folder, methods, **settings):
    return ContinualTrainer(
        toy.model(),
        SFTConfig(**toy.settings(folder, **settings)),
        train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
        methods=methods,
    )


def values(trainer):
    """What was logged, without the token count, which SFTTrainer itself begins anew after a resume."""
    return [{k: v for k, v in entry.items() if k != "num_tokens"} for entry in toy.logs(trainer)]


@pytest.mark.parametrize("name", TABLE)
def test_zero_strength_is_plain_fine_tuning(tmp_path, name):
    changes = {"max_steps": 6, **getattr(module(name), "ZERO_SETTINGS", {})}
    settings = toy.settings(tmp_path, **changes)
    plain = SFTTrainer(toy.model(), SFTConfig(**settings), train_dataset=toy.rows(), processing_class=toy.tokenizer())
    plain.train()
    ours = build(tmp_path, [module(name).zero(None)], **changes)
    ours.train()
    far = (toy.flat(plain.model) - toy.flat(ours.model)).abs().max()
    assert far <= module(name).ZERO_TOLERANCE
    strong = build(tmp_path, [module(name).example(None)], **changes)
    strong.train()
    assert (toy.flat(plain.model) - toy.flat(strong.model)).abs().max() > 1e-4  # and strength does something


@pytest.mark.parametrize("names", [[n] for n in TABLE] + [list(TABLE)], ids=lambda n: "+".join(n))
@pytest.mark.parametrize("layout", [{}, {"packing": True, "max_length": 32}], ids=["padded", "packed"])
def test_resumed_is_uninterrupted(tmp_path, names, layout):
    def methods():
        return [module(name).example(None) for name in names]

    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "gradient_accumulation_steps": 2, **layout}
    straight = build(tmp_path / "a", methods(), **settings)
    straight.train()
    resumed = build(tmp_path / "a", methods(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert torch.equal(toy.flat(straight.model), toy.flat(resumed.model))
    assert values(straight)[3:6] == values(resumed)[3:6]
    with pytest.raises(ValueError, match="written with other methods"):
        build(tmp_path / "a", [], **settings).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    """All methods on, the process killed while it trains, a half-written checkpoint beside the whole one."""
    command = [sys.executable, "-m", "tests.methods.children", "train", str(tmp_path / "killed")]
    child = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "KILL_AT": "5"})
    assert child.wait(timeout=200) == -signal.SIGKILL
    assert (tmp_path / "killed" / "checkpoint-4").is_dir()
    (tmp_path / "killed" / "checkpoint-5").mkdir()  # as if the next one had been begun
    resumed = children.trainer(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    straight = children.trainer(tmp_path / "straight")
    straight.train()
    assert torch.equal(toy.flat(straight.model), toy.flat(resumed.model))
    assert values(straight)[-3:-1] == values(resumed)[-3:-1]


@pytest.mark.parametrize("name", TABLE)
def test_one_forward_per_micro_batch(tmp_path, name):
    trainer = build(tmp_path, [module(name).example(None)], max_steps=2, gradient_accumulation_steps=2)
    calls = []
    trainer.model.register_forward_hook(lambda *a: calls.append(1))
    trainer.train()
    assert len(calls) == 4 + getattr(module(name), "EXTRA_FORWARDS", 0)


@pytest.mark.parametrize("name", TABLE)
def test_state_goes_through_safetensors(tmp_path, name):
    trainer = build(tmp_path, [module(name).example(None)])
    trainer.train()
    (method,) = trainer.methods
    state = method.state_dict(trainer.run)
    tensors = {k: v for k, v in state.items() if torch.is_tensor(v)}
    if tensors:
        save_file(tensors, tmp_path / "state.safetensors")
        assert all(torch.equal(v, tensors[k]) for k, v in load_file(tmp_path / "state.safetensors").items())
    json.dumps({k: v for k, v in state.items() if not torch.is_tensor(v)})


@pytest.mark.parametrize("name", TABLE)
def test_description_rebuilds_the_method(name, tmp_path):
    """As data and as text, and the data gives the same run as the object."""
    toy.rows(seed=9, low=30, high=59).to_json(tmp_path / "rows.jsonl")
    options = {key: str(tmp_path / "rows.jsonl") for key in ("rows", "memory")}
    example = module(name).example(None)
    described = {k: options.get(k, v) for k, v in example.describe().items()}
    (rebuilt,) = build_methods(yaml.safe_load(yaml.safe_dump({name: described})))
    assert rebuilt.describe() == described and type(rebuilt) is method_class(name)
    assert eval(repr(rebuilt), {type(rebuilt).__name__: type(rebuilt)}) == rebuilt
    described_run = ContinualTrainer(
        toy.model(),
        ContinualConfig(**toy.settings(tmp_path), methods={name: described}),
        train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
    )
    described_run.train()
    given = build(tmp_path, [example])
    given.train()
    assert torch.equal(toy.flat(described_run.model), toy.flat(given.model))


@pytest.mark.parametrize("name", TABLE)
def test_it_has_a_paper_a_test_file_and_a_recipe(name):
    cls = method_class(name)
    assert isinstance(cls.paper, Paper) and cls.paper.bibtex
    assert cls.__doc__ and "Args:" in cls.__doc__ and "Stations:" in cls.__doc__
    folder = ROOT / "recipes" / name
    assert (folder / "README.md").is_file() and list(folder.glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: "+".join(p))
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_pairs_train_together(tmp_path, pair, peft):
    from peft import LoraConfig

    methods = [module(name).example(None) for name in pair]
    try:
        Methods(methods)
    except ValueError as refused:
        pytest.fail(f"{pair} do not compose: {refused}")
    trainer = ContinualTrainer(
        toy.model(),
        SFTConfig(**toy.settings(tmp_path, max_steps=2)),
        train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
        peft_config=LoraConfig(r=2, target_modules="all-linear") if peft else None,
        methods=methods,
    )
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
