"""KIF's cost: what a round takes on top of its plain training steps, mask selection against torch.quantile, state.

    python tests/benchmarks/kif.py [MODEL]

MODEL is a folder or Hub id; by default the embedded SmolLM2-135M with LoRA in float32. One thread, processor time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).parents[2]))

import datasets
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from hf_continual import KIF, ContinualTrainer
from hf_continual.data.biography import biography_rows
from hf_continual.tensors.importance import top_share_masks

INNER, OUTER, ROUNDS, PAIRS = 8, 4, 1, 3


def trainer(kind: str, path: str, folder: str, dtype: str) -> SFTTrainer:
    """Q inner and M outer steps per round, or as many plain ones; all rows have the same length."""
    rows = biography_rows(60, "texts", versions=2).select_columns(["text"])
    settings = {
        "output_dir": folder, "per_device_train_batch_size": 4, "bf16": False, "use_cpu": True, "report_to": [],
        "max_steps": ROUNDS * (INNER if kind == "kif" else INNER + OUTER), "save_strategy": "no",
        "logging_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False, "max_length": 64,
        "pad_to_multiple_of": 64,
    }  # fmt: skip
    common = {
        "model": AutoModelForCausalLM.from_pretrained(path, dtype=dtype), "args": SFTConfig(**settings),
        "train_dataset": rows, "processing_class": AutoTokenizer.from_pretrained(path),
        "peft_config": LoraConfig(r=8, target_modules="all-linear"),
    }  # fmt: skip
    methods = [KIF(rows, inner_steps=INNER, outer_steps=OUTER)]
    made = ContinualTrainer(**common, methods=methods) if kind == "kif" else SFTTrainer(**common)
    made.remove_callback(PrinterCallback)
    return made


def seconds(call) -> float:
    """Processor seconds of a call; one thread, so that other processes on the machine do not count."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def own_work(method: KIF) -> list[float]:
    """Seconds that the method itself takes in the next run: averages, selection, fusion, the outer Adam."""
    spent: list[float] = []

    def timed(function):
        def call(*args, **kwargs):
            begin = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent.append(time.process_time() - begin)

        return call

    set_up = method._set_up

    def watched(run):
        set_up(run)
        sides, learner = method._sides, method._learner
        assert sides is not None and learner is not None
        for owner, names in ((sides, ("record", "end_inner", "fuse")), (learner, ("step",))):
            for name in names:
                setattr(owner, name, timed(getattr(owner, name)))

    method._set_up = watched  # pyrefly: ignore
    return spent


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--dtype", default="float32", help="bfloat16 where the processor computes in it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    if args.model is None:
        from hf_continual.demo.model import embedded_model

        args.model = str(embedded_model())
    scores = {"x": torch.rand(4_000_000, generator=torch.Generator().manual_seed(0))}
    ours, theirs = [], []
    for _ in range(5):
        ours.append(seconds(lambda: top_share_masks(scores, 0.2)))
        theirs.append(seconds(lambda: scores["x"] > torch.quantile(scores["x"], 0.8)))
    print(
        f"speed, mask of the top 20 % of 4 M scores, top_share_masks / torch.quantile: "
        f"{statistics.median(theirs) / statistics.median(ours):.1f}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        ratios, shares = [], []
        for i in range(PAIRS + 1):
            plain, kif = trainer("sft", args.model, folder, args.dtype), trainer("kif", args.model, folder, args.dtype)
            (method,) = kif.methods
            spent = own_work(method)
            times = [seconds(plain.train), seconds(kif.train)]
            if i:
                ratios.append(times[1] / times[0])
                shares.append(sum(spent) / times[1])
        number = sum(p.numel() for p in kif.model.parameters() if p.requires_grad)
        print(
            f"time, a round of {INNER} + {OUTER} steps / {INNER + OUTER} plain steps of SFTTrainer: "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )
        print(
            f"share of a round that is averages, selection, fusion and the outer Adam: {statistics.median(shares):.4f}"
        )
        print(
            f"state, values of 4 bytes per trainable weight ({number} weights): {method.memory_bytes() / number / 4:.2f}, "
            f"of these {2:.0f} are the outer learner's moments"
        )


if __name__ == "__main__":
    main()
