"""Step time and memory of ContinualTrainer(methods=[]) against SFTTrainer: the ratio of both should be 1.

The two run in turn, several times; the median of the pairwise ratios is printed. `python tests/benchmarks/trainer.py`
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import tracemalloc
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).parents[2]))

import datasets
import torch
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from hf_continual import ContinualTrainer
from tests import toy

STEPS, PAIRS = 60, 9


def seconds_per_step(trainer_class: type, folder: str) -> tuple[float, float]:
    settings = toy.settings(folder, max_steps=STEPS, logging_steps=STEPS, logging_strategy="no")
    model = toy.model(hidden_size=128, intermediate_size=256)
    trainer = trainer_class(
        model, SFTConfig(**settings), train_dataset=toy.rows(number=64), processing_class=toy.tokenizer()
    )
    trainer.remove_callback(PrinterCallback)
    tracemalloc.start()
    begin = time.perf_counter()
    trainer.train()
    taken = (time.perf_counter() - begin) / STEPS
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return taken, peak


def main() -> None:
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        for trainer_class in (SFTTrainer, ContinualTrainer):
            seconds_per_step(trainer_class, folder)
        pairs = [
            (seconds_per_step(SFTTrainer, folder), seconds_per_step(ContinualTrainer, folder)) for _ in range(PAIRS)
        ]
    ratios = sorted(ours[0] / theirs[0] for theirs, ours in pairs)
    memory = statistics.median(ours[1] / theirs[1] for theirs, ours in pairs)
    print("ContinualTrainer(methods=[]) / SFTTrainer, tiny model (overhead shows most)")
    print(f"  step time   {statistics.median(ratios):.3f}   (min {ratios[0]:.3f}, max {ratios[-1]:.3f}, {PAIRS} pairs)")
    print(f"  peak host memory of Python objects   {memory:.3f}")


if __name__ == "__main__":
    main()
