"""A cell of the families table: a tiny model of a family, trained with a method, and checked."""

from __future__ import annotations

import math
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from hf_continual import KIF, ContinualConfig, ContinualTrainer, FreezeLayers, GeRe, RecAdam, Replay
from hf_continual.methods.base import Method
from hf_continual.tasks import Task
from hf_continual.tensors.layers import find_blocks
from tests import toy
from tests.families.configs import EMBEDDINGS, build
from tests.families.notes import FAILS, LOSS, REFUSED, SETTINGS, TARGETS, outcome
from tests.methods.fake_run import FakeRun


def construct(kind: str, methods: list[Method], folder: Path, peft: Any = None) -> ContinualTrainer:
    """A trainer of two steps on short text."""
    changes = SETTINGS[kind][0] if kind in SETTINGS else {}
    return ContinualTrainer(
        build(kind),  # pyrefly: ignore[bad-argument-type]
        ContinualConfig(**toy.settings(folder, max_steps=2, per_device_train_batch_size=2, max_length=16, **changes)),
        train_dataset=toy.rows(number=8),
        processing_class=toy.tokenizer(),
        peft_config=peft,
        methods=methods,
    )


def train(kind: str, method: Method, folder: Path, peft: Any = None) -> ContinualTrainer:
    """Two steps with a method: something moves, nothing frozen does, and every loss is finite."""
    trainer = construct(kind, [method], folder, peft)
    with watched(trainer.model) as moved:
        trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert parameter.requires_grad or name not in moved, f"{name} is frozen and moved"
    assert moved, "nothing moved"
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    return trainer


@contextmanager
def watched(model: nn.Module) -> Iterator[set[str]]:
    """The names of the parameters that move inside."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved: set[str] = set()
    yield moved
    moved |= {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def logged(trainer: ContinualTrainer, key: str) -> list[float]:
    """A logged value, step by step; it must be there and finite."""
    values = [entry[key] for entry in trainer.state.log_history if key in entry]
    assert values and all(math.isfinite(v) for v in values), f"{key} was logged as {values}"
    return values


def check_head(model: nn.Module) -> None:
    """The loss is computed from the backbone's last hidden states: the head must read these and no others."""
    read: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda m, args: read.append(args[0]))
    ids = torch.arange(5, 13)[None]
    with torch.no_grad():
        model.eval()(input_ids=ids, use_cache=False)
        last = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    hook.remove()
    torch.testing.assert_close(read[0], last, msg="the head reads other states than the last hidden ones")


def replay(kind: str, folder: Path) -> None:
    """Rows are mixed in, and their tokens are counted."""
    trainer = train(kind, Replay(toy.rows(seed=5, low=30, high=60), ratio=0.5), folder)
    logged(trainer, "replay/loss")
    totals = trainer.replay_totals()
    assert totals is not None and totals[:, :, 1].sum() > 0


def gere(kind: str, folder: Path) -> None:
    """The compared states are those the head reads, and at the first step they are the recorded ones."""
    method = GeRe(toy.rows(seed=5), per_batch=1, num_samples=6, dead_band=1e-4, cache_dir=str(folder / "cache"))
    trainer = train(kind, method, folder)
    assert logged(trainer, "gere/violations")[0] == 0
    logged(trainer, "gere/tm")
    if kind not in LOSS:
        check_head(build(kind))


def expected(kind: str, model: nn.Module, bottom: int) -> tuple[str, ...]:
    """Beginnings of the names that FreezeLayers must freeze."""
    path = find_blocks(model).path
    stack = path.rpartition(".")[0]
    below = [f"{stack}.{name}." for name in EMBEDDINGS.get(kind, ["embed_tokens"])]
    return (*below, *(f"{path}.{i}." for i in range(bottom)))


def freeze(kind: str, folder: Path) -> None:
    """The frozen set is exact, and every other gradient is the one that the plain model has."""
    train(kind, FreezeLayers(bottom=1), folder)
    model = build(kind)
    for p in model.parameters():  # factors that start at zero would hide the layers before them
        if p.dim() > 1 and not p.any():
            nn.init.normal_(p, std=0.05)
    plain, names = deepcopy(model), {id(p): name for name, p in model.named_parameters()}
    frozen = expected(kind, model, bottom=1)
    tied = {names[id(p)] for n, p in model.named_parameters(remove_duplicate=False) if n.startswith(frozen)}
    method = FreezeLayers(bottom=1)
    before = {n for n, p in model.named_parameters() if not p.requires_grad}
    method.prepare_model(model, Task())
    now = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert now == tied | before, f"frozen {sorted(now - tied - before)}, not frozen {sorted(tied - now)}"
    ids = torch.arange(4, 24).view(2, 10)
    method.begin_task(FakeRun(model))
    for each in (model, plain):
        each.train()
        torch.manual_seed(0)
        each(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    method.release()
    for name, p in model.named_parameters():
        wanted = plain.get_parameter(name).grad if name not in now else None
        assert (p.grad is None) == (wanted is None), f"{name}: gradient {p.grad is not None}"
        if wanted is not None:
            torch.testing.assert_close(p.grad, wanted, msg=f"{name}: another gradient")


def freeze_lora(kind: str, folder: Path) -> None:
    """No adapter is below, each above is trained."""
    targets = TARGETS[kind][0] if kind in TARGETS else "all-linear"
    trainer = train(
        kind, FreezeLayers(bottom=1), folder, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    )
    base = trainer.model.get_base_model()
    frozen = expected(kind, base, bottom=1)
    trained = [n for n, p in base.named_parameters() if p.requires_grad]
    assert trained and not [n for n in trained if n.startswith(frozen)]
    assert all("lora_" in n for n in trained)


def recadam(kind: str, folder: Path) -> None:
    """Its optimizer moves every weight that has a gradient."""
    trainer = train(kind, RecAdam(anneal="none", pull=0.01), folder)
    assert "RecAdam" in type(trainer.run.optimizer).__name__


def kif(kind: str, folder: Path) -> None:
    """Rounds of a step on the task and a step on the buffer, fused."""
    memory = toy.rows(seed=5, number=8, low=30, high=60)
    trainer = train(kind, KIF(memory, inner_steps=1, outer_steps=1), folder)
    assert len(logged(trainer, "kif/memory_loss")) == 2


CELLS: dict[str, Callable[[str, Path], None]] = {
    "Replay": replay,
    "GeRe": gere,
    "FreezeLayers": freeze,
    "FreezeLayers, LoRA": freeze_lora,
    "RecAdam": recadam,
    "KIF": kif,
}


def run(kind: str, method: str) -> str:
    """Train and check a cell, or see that it fails as it should.

    Args:
        kind: A family.
        method: A key of `CELLS`.

    Returns:
        The cell's result, one of the answers of `outcome`.

    Raises:
        AssertionError: If a check fails, or an error has the wrong message.
    """
    should = outcome(kind, method)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if should == "yes":
            CELLS[method](kind, folder)
        elif should == "refused":
            error = error_of(lambda: CELLS[method](kind, folder))
            assert isinstance(error, ValueError) and REFUSED[kind][0] in str(error), error
            assert "construct" in [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        else:
            error = error_of(lambda: construct(kind, [], folder).train())
            assert FAILS[kind] in str(error), error
    return should


def error_of(call: Callable[[], Any]) -> Exception:
    """What a call raises, which it must."""
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")
