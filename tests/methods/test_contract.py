"""The contract of every method in the table, alone and in pairs. New methods are found automatically.

Each method's test file `tests/methods/test_NAME.py` offers `example(world)`, `zero(world)` and `ZERO_TOLERANCE`; it may set
`ADAPTERS_ONLY`, `LINEAR_ONLY` (it needs trained linear weights), `NEEDS_PREDECESSOR` (it does nothing without an earlier task),
`CONTINUES` (all tasks train one adapter), `ZERO_SETTINGS` (training options of the zero-strength run), `SHORTER` (options that make a
recipe short enough to run) and `EXTRA_FORWARDS`.
"""

from __future__ import annotations

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
from hf_continual.data import handover
from hf_continual.methods.compose import Methods
from hf_continual.methods.table import TABLE, build_methods, method_class
from hf_continual.paper import Paper
from tests import toy
from tests.methods import children, covering
from tests.methods.covering import example, module, zero
from tests.trainer.same import same

ROOT = Path(__file__).parents[2]
TOGETHER = max(covering.groups(len(TABLE)), key=len)  # as many methods as one run can have


def build(folder, methods, names, peft=False, **settings):
    """A run with methods, starting from what these methods need."""
    return ContinualTrainer(
        **covering.start(names, peft),
        args=SFTConfig(**toy.settings(folder, **settings)),
        train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
        methods=methods,
    )


def values(trainer):
    """What was logged, without the token count, which SFTTrainer itself restarts after a resume."""
    return [{k: v for k, v in entry.items() if k != "num_tokens"} for entry in toy.logs(trainer)]


@pytest.mark.parametrize("name", TABLE)
def test_zero_strength_is_plain_fine_tuning(tmp_path, name):
    if covering.own_modules([name]):
        return nothing_of_the_base_moves(tmp_path, name)
    changes = {"max_steps": 6, **getattr(module(name), "ZERO_SETTINGS", {})}
    settings = toy.settings(tmp_path, **changes)
    plain = SFTTrainer(
        **covering.plain_start([name]),
        args=SFTConfig(**settings),
        train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
    )
    plain.train()
    ours = build(tmp_path, [zero(name)], [name], **changes)
    ours.train()
    far = (toy.flat(plain.model) - toy.flat(ours.model)).abs().max()
    assert far <= module(name).ZERO_TOLERANCE
    strong = build(tmp_path, [example(name)], [name], **changes)
    strong.train()
    assert (toy.flat(plain.model) - toy.flat(strong.model)).abs().max() > 1e-4  # and the strength has an effect


def nothing_of_the_base_moves(folder, name):
    """A method that trains its own modules is never plain fine-tuning, but it leaves the base alone, bit for bit."""
    trainer, base = build(folder, [example(name)], [name], max_steps=6), toy.model()
    trainer.train()
    assert {n for n, _ in base.named_parameters()} & {
        n.removeprefix("base_model.model.") for n in trainer.run.named_parameters()
    } == set()
    ids = torch.tensor([[5, 9, 12, 30]])
    with torch.no_grad():
        plain, ours = base.eval()(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits
        with trainer.model.disable_adapter():
            assert torch.equal(trainer.model(input_ids=ids).logits, plain)
    assert (ours - plain).abs().max() > 1e-4  # and the modules do something


PACKED = {"packing": True, "max_length": 32}
# All methods at once on packed rows take minutes: VR-MCL's passes come with every step of GradientProjection's runs.
RESUMED = [
    pytest.param(layout, [n], id=f"{how}-{n}") for how, layout in (("padded", {}), ("packed", PACKED)) for n in TABLE
]
RESUMED += [
    pytest.param({}, list(TOGETHER), id="padded-together"),
    pytest.param(PACKED, list(TOGETHER), id="packed-together", marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize(("layout", "names"), RESUMED)
def test_resumed_is_uninterrupted(tmp_path, names, layout):
    def methods():
        return [example(name) for name in names]

    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "gradient_accumulation_steps": 2, **layout}
    if layout and covering.choose_by_row(names):
        with pytest.raises(ValueError, match="chooses for each row, but with packing=True"):
            build(tmp_path / "a", methods(), names, **settings)
        return
    straight = build(tmp_path / "a", methods(), names, **settings)
    straight.train()
    resumed = build(tmp_path / "a", methods(), names, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert torch.equal(toy.flat(straight.model), toy.flat(resumed.model))
    assert values(straight)[3:6] == values(resumed)[3:6]
    assert same(straight.task_states, resumed.task_states)
    with pytest.raises(ValueError, match="written with different methods|but this run is without it"):
        build(tmp_path / "a", [], names, **settings).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    """All methods on, the process killed while it trains, a half-written checkpoint next to the complete one."""
    command = [sys.executable, "-m", "tests.methods.children", "train", str(tmp_path / "killed")]
    child = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "KILL_AT": "5"})
    assert child.wait(timeout=200) == -signal.SIGKILL
    assert (tmp_path / "killed" / "checkpoint-4").is_dir()
    (tmp_path / "killed" / "checkpoint-5").mkdir()  # as if the next one had been started
    resumed = children.trainer(tmp_path / "killed", children.baselines())
    resumed.train(resume_from_checkpoint=True)
    straight = children.trainer(tmp_path / "straight", children.baselines())
    straight.train()
    assert torch.equal(toy.flat(straight.model), toy.flat(resumed.model))
    assert values(straight)[-3:-1] == values(resumed)[-3:-1]


@pytest.mark.parametrize("name", TABLE)
def test_one_forward_per_micro_batch(tmp_path, name):
    trainer = build(tmp_path, [example(name)], [name], max_steps=2, gradient_accumulation_steps=2)
    calls = []
    trainer.model.register_forward_hook(lambda *a: calls.append(1))
    trainer.train()
    assert len(calls) == 4 + getattr(module(name), "EXTRA_FORWARDS", 0)


@pytest.mark.parametrize("name", TABLE)
def test_state_goes_through_safetensors(tmp_path, name):
    trainer = build(tmp_path, [example(name)], [name])
    trainer.train()
    (method,) = trainer.methods
    for state in (method.state_dict(trainer.run), method.task_state(trainer.run)):
        tensors = {k: v for k, v in state.items() if torch.is_tensor(v)}
        if tensors:
            save_file(tensors, tmp_path / "state.safetensors")
            assert all(torch.equal(v, tensors[k]) for k, v in load_file(tmp_path / "state.safetensors").items())
        json.dumps({k: v for k, v in state.items() if not torch.is_tensor(v)})


@pytest.mark.parametrize("names", [[n] for n in TABLE] + [list(TOGETHER)], ids=lambda n: "+".join(n))
def test_three_folders_are_one_process(tmp_path, names):
    """Three tasks, each from the folder before: the next task works with the state on disk."""
    folder, peft = None, covering.adapters_only(names)
    toy.model().save_pretrained(tmp_path / "base")
    for task in range(3):
        trainer = ContinualTrainer(
            str(folder or tmp_path / "base"),
            ContinualConfig(**toy.settings(tmp_path / str(task), max_steps=3), task_index=task),
            train_dataset=toy.rows(seed=20 + task),
            processing_class=toy.tokenizer(),
            peft_config=covering.lora() if peft and not (task and covering.continues(names)) else None,
            methods=[example(name) for name in names],
        )
        trainer.train()
        trainer.save_model()
        folder = tmp_path / str(task)
        left = handover.read(folder)
        states = {n: s for n, s in trainer.task_states.items() if s}
        assert (left.names if left else []) == list(states)
        for method, state in states.items():
            assert same(
                handover.state_of(left, method), {k: v.cpu() if torch.is_tensor(v) else v for k, v in state.items()}
            )
        if task:
            assert (trainer.predecessor.names if trainer.predecessor else []) == list(states)


@pytest.mark.parametrize("name", TABLE)
def test_a_method_in_a_second_trainer_is_as_new(tmp_path, name):
    """A list of methods made once, outside a loop over runs: the second run must not depend on the first."""
    used, runs = example(name), []
    build(tmp_path / "first", [used], [name], max_steps=3).train()
    for i, method in enumerate((used, example(name))):
        trainer = ContinualTrainer(  # of another model, without an earlier task
            toy.model(seed=3), SFTConfig(**toy.settings(tmp_path / str(i), max_steps=3)), train_dataset=toy.rows(seed=6),
            processing_class=toy.tokenizer(), methods=[method],
            peft_config=covering.lora() if covering.adapters_only([name]) else None,
        )  # fmt: skip
        trainer.train()
        runs.append((toy.flat(trainer.model), trainer.task_states))
    assert torch.equal(runs[0][0], runs[1][0]) and same(runs[0][1], runs[1][1])


@pytest.mark.parametrize("name", TABLE)
def test_description_rebuilds_the_method(name, tmp_path):
    """Methods as data and as text; the data gives the same run as the object."""
    toy.rows(seed=9, low=30, high=59).to_json(tmp_path / "rows.jsonl")
    given = example(name)
    described = {
        k: str(tmp_path / "rows.jsonl") if isinstance(v, dict) and "fingerprint" in v else v
        for k, v in given.describe().items()
    }
    (rebuilt,) = build_methods(yaml.safe_load(yaml.safe_dump({name: described})))
    assert rebuilt.describe() == described and type(rebuilt) is method_class(name)
    assert eval(repr(rebuilt), {type(rebuilt).__name__: type(rebuilt)}) == rebuilt
    assert Methods([rebuilt]).describe() == [{name: described}]
    described_run = ContinualTrainer(
        **covering.start([name]),
        args=ContinualConfig(**toy.settings(tmp_path), methods={name: described}),
        train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
    )
    described_run.train()
    by_object = build(tmp_path, [given], [name])
    by_object.train()
    assert torch.equal(toy.flat(described_run.model), toy.flat(by_object.model))


@pytest.mark.parametrize("name", TABLE)
def test_it_has_a_paper_a_test_file_and_a_recipe(name):
    cls = method_class(name)
    assert isinstance(cls.paper, Paper) and cls.paper.bibtex, (
        f"{name}: give the class a paper = Paper(title, authors, year, ...)."
    )
    assert cls.__doc__ and "Args:" in cls.__doc__ and "Hooks:" in cls.__doc__, (
        f"{name}: its docstring needs `Args:` and `Hooks: ...`."
    )
    folder = ROOT / "recipes" / name
    assert (folder / "README.md").is_file() and list(folder.glob("*.yaml")), (
        f"{folder} needs a README.md and a YAML file."
    )


def train_together(folder, names, peft):
    methods = [example(name) for name in names]
    Methods(methods)
    trainer = build(folder, methods, names, peft, max_steps=2)
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def kinds_of_weights(names):
    if covering.own_modules(names):
        return [False]
    return [True] if covering.adapters_only(names) else [False, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "peft"),
    [(names, peft) for names in covering.groups() for peft in kinds_of_weights(names)],
    ids=lambda v: "+".join(v) if isinstance(v, tuple) else ("lora" if v else "full"),
)
def test_every_pair_trains_together_in_some_group(tmp_path, names, peft):
    train_together(tmp_path, names, peft)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("names", "peft"),
    [(names, peft) for names in covering.pairs() for peft in kinds_of_weights(names)],
    ids=lambda v: "+".join(v) if isinstance(v, tuple) else ("lora" if v else "full"),
)
def test_pairs_train_together(tmp_path, names, peft):
    train_together(tmp_path, names, peft)


def test_the_groups_hold_every_pair():
    held = {frozenset((a, b)) for group in covering.groups() for a in group for b in group if a != b}
    assert held == {frozenset(pair) for pair in covering.pairs()}
    # On full weights the pairs with a method for adapters only are left to the runs with adapters.
    assert all(covering.allowed(group) for group in covering.groups())
