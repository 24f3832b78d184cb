"""Two tasks on another library's trainer, in processes of their own: handed over, resumed, and inert at zero strength."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from hf_continual.data import handover
from tests import toy

ROOT = Path(__file__).parents[2]
METHODS = [{"freeze": {"bottom": 1}}, {"ewc": {"weight": 1e5}}, {"migu": {"share": 0.3, "first_task": True}}]
INERT = [{"freeze": {"bottom": 1, "from_task": 1}}, {"ewc": {"weight": 0.0}}, {"migu": {"share": 1.0}}]


def write_base(folder: Path) -> None:
    """The model that both tasks begin with, and the rows of the two as ``one.jsonl`` and ``two.jsonl``."""
    toy.model().save_pretrained(folder / "base")
    toy.tokenizer().save_pretrained(folder / "base")
    for name, seed in (("one", 1), ("two", 5)):
        pairs = zip(toy.rows(seed=seed)["text"], toy.rows(seed=seed + 10)["text"], strict=True)
        rows = [{"instruction": a, "input": "", "output": b} for a, b in pairs]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def in_a_process(words: Sequence[str], place: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, offline and on the CPU."""
    given = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *words],
        cwd=place,
        env=given,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model."""
    return load_file(folder / "model.safetensors")


def trained(done: subprocess.CompletedProcess[str]) -> None:
    """Whether a process ended well."""
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def check_two_tasks(train: Callable[..., subprocess.CompletedProcess[str]], place: Path) -> None:
    """Train both tasks, resume the second, and compare a run without methods with one at zero strength."""
    trained(train(place, "first", place / "base", "one", {"methods": METHODS, "task_name": "one"}))
    found = handover.read(place / "first")
    assert found is not None and found.names == ["ewc", "migu"] and found.task["name"] == "one"
    second = {"methods": [*METHODS, {"recadam": {"pull": 0.05, "anneal": "none"}}], "task_name": "two", "task_index": 1}
    trained(train(place, "second", place / "first", "two", second))
    assert handover.state_of(handover.read(place / "second"), "ewc")["tasks"] == 2
    before, after = weights(place / "first"), weights(place / "second")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {n for n in before if ".layers.0." in n} <= same and any(".layers.3.mlp" in n for n in before.keys() - same)
    state = json.loads((place / "second" / "checkpoint-4" / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    assert len(logged) == 4
    assert all(entry["recadam/distance"] >= 0 and 0 < entry["freeze/trainable"] < 1 for entry in logged)
    middle = str(place / "second" / "checkpoint-2")
    trained(train(place, "second", place / "first", "two", second, resume_from_checkpoint=middle))
    again = weights(place / "second")
    assert all(torch.equal(after[name], again[name]) for name in after)
    trained(train(place, "plain", place / "first"))
    trained(train(place, "inert", place / "first", continual={"methods": INERT}))
    plain, ours = weights(place / "plain"), weights(place / "inert")
    assert all(torch.equal(plain[name], ours[name]) for name in plain)
    assert not torch.equal(plain["lm_head.weight"], before["lm_head.weight"])
