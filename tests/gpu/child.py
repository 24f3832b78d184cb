"""Train in a separate process and be killed at a step: ``python -m tests.gpu.child FOLDER DEVICE STEP [METHOD ...]``."""

from __future__ import annotations

import os
import signal
import sys

import torch
from transformers import TrainerCallback

from hf_continual import KIF, ContinualTrainer, GeRe, RecAdam, Replay
from tests import toy
from tests.gpu import runs

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


def methods(folder):
    """Those whose state is most: a draw of rows, recorded states, an importance and an optimizer."""
    rows = toy.rows(seed=9, low=30, high=59)
    return [
        Replay(rows, ratio=0.3),
        GeRe(rows, ratio=0.1, cache_dir=f"{folder}/cache"),
        KIF(rows, inner_steps=2, outer_steps=1),
        RecAdam(anneal="none", pull=0.01),
    ]


def build(folder, device):
    """The run that is killed, and resumed."""
    return runs.build(ContinualTrainer, f"{folder}/run", device, *methods(folder), **SAVING)


class Killed(TrainerCallback):
    """Ends the process as a machine that is taken away does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    trainer = build(sys.argv[1], sys.argv[2])
    trainer.add_callback(Killed(int(sys.argv[3])))
    trainer.train()
