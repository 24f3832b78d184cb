"""What goes wrong in one of two processes: `python -m tests.distributed.faults rows|raises|killed FOLDER` under torchrun."""

from __future__ import annotations

import os
import signal
import sys

from transformers import TrainerCallback

from hf_continual import ContinualConfig, ContinualTrainer, Replay
from tests import toy

WHAT, FOLDER = sys.argv[1:3]
SECOND = os.environ.get("RANK") == "1"


class Fault(TrainerCallback):
    """In the third step of the second process."""

    def on_step_begin(self, args, state, control, **kwargs):
        if SECOND and state.global_step == 2:
            if WHAT == "raises":
                1 / 0  # noqa: B018
            if WHAT == "killed":
                os.kill(os.getpid(), signal.SIGKILL)


trainer = ContinualTrainer(
    toy.model(),
    ContinualConfig(**toy.settings(FOLDER, per_device_train_batch_size=2, max_steps=50)),
    train_dataset=toy.rows(number=9 if SECOND and WHAT == "rows" else 24),
    processing_class=toy.tokenizer(),
    methods=[Replay(toy.rows(seed=9), ratio=0.2)],
    callbacks=[Fault()],
)
trainer.train()
