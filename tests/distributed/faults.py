"""Faults in one of two processes: `python -m tests.distributed.faults rows|raises|killed|stopped FOLDER` under torchrun.

``straight`` is the undisturbed run; ``stopped`` is asked to stop, and resumes the next time.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from transformers import TrainerCallback

from hf_continual import ContinualConfig, ContinualTrainer, Replay, Stopped
from tests import toy

WHAT, FOLDER = sys.argv[1:3]
RESUMES = any(Path(FOLDER).glob("checkpoint-*"))
SECOND = os.environ.get("RANK") == "1"


class Fault(TrainerCallback):
    """In the third step of the second process."""

    def on_step_begin(self, args, state, control, **kwargs):
        if SECOND and state.global_step == 2:
            if WHAT == "raises":
                1 / 0  # noqa: B018
            if WHAT == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if WHAT == "stopped" and not RESUMES:
                os.kill(os.getpid(), signal.SIGTERM)


trainer = ContinualTrainer(
    toy.model(),
    ContinualConfig(
        **toy.settings(FOLDER, per_device_train_batch_size=2, max_steps=50 if WHAT in ("raises", "killed") else 8)
    ),
    train_dataset=toy.rows(number=9 if SECOND and WHAT == "rows" else 24),
    processing_class=toy.tokenizer(),
    methods=[Replay(toy.rows(seed=9), ratio=0.2)],
    callbacks=[Fault()],
)
try:
    trainer.train(resume_from_checkpoint=RESUMES or None)
except Stopped as stopped:
    (Path(FOLDER) / f"stopped-{os.environ['RANK']}").write_text(f"{stopped.code} {stopped}")
    raise
trainer.save_model()
