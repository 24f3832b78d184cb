"""What `test_distributed.py` runs under torchrun: `python -m tests.gauges.child FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import torch

from hf_continual import ContinualConfig, ContinualTrainer
from tests import toy

# Five rows, so that two processes have different numbers of them.
GAUGES = {"general": toy.rows("text", number=5, seed=9), "task": {"limit": 5}, "every": 1, "batch_size": 2}
RULE = {"gauge": "general/loss_change", "above": 0.2, "for": 2, "noise": 0}


def run(folder: Path, **settings) -> ContinualTrainer:
    trainer = ContinualTrainer(
        toy.model(),
        ContinualConfig(
            **toy.settings(folder, max_steps=12, learning_rate=5e-2, **settings), gauges=GAUGES, rollback_if=RULE
        ),
        train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
    )
    trainer.train()
    return trainer


def outcome(trainer) -> dict:
    """What must be the same."""
    points = [{k: v for k, v in e.items() if "gauge" in k} for e in trainer.state.log_history]
    return {"points": [p for p in points if p], "ended": trainer.ended, "step": trainer.state.global_step}


if __name__ == "__main__":
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    trained = run(place, gradient_accumulation_steps=1, per_device_train_batch_size=2)
    weights = toy.flat(trained.model)
    everyone = trained.accelerator.gather(weights[None])
    assert torch.equal(everyone[0], everyone[1]), "both processes went back to the same weights"
    if trained.is_world_process_zero():
        (place / "outcome.json").write_text(json.dumps(outcome(trained)))
    torch.distributed.destroy_process_group()
