"""Does KIF keep old tasks? Against plain LoRA and against the same memory mixed in, at the same number of steps.

    python recipes/kif/compare.py --data data/longseq --general data/general.heldout.jsonl --model MODEL

The four tasks of the Standard benchmark in order 1. Every arm makes `--rounds` times Q + M optimizer steps per task: KIF
spends Q on the task and M on memory, mixing spends all on both, plain spends all on the task. The memory is the paper's:
2 % of each task's rows, balanced over its classes. Runs are resumed; the table is built from the finished runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from hf_continual import train_stream
from hf_continual.methods.kif import PUBLISHED

KEPT = {"memory": "kept", "row_type": "same"}
ARMS: dict[str, dict | None] = {
    "plain": None,
    "mixed": {"replay": {"rows": "kept", "ratio": 1 / 3}},
    "kif": {},  # the defaults
    "kif-code": {"rule": "code", "uncertainty": True},
    "kif-code-shared": {"rule": "code", "uncertainty": True, "outer_optimizer": "shared"},
    "kif-t5": PUBLISHED["t5"],
    "kif-llama": PUBLISHED["llama"],
    # The paper's ablations.
    "kif-static": {"old_importance": "static"},
    "kif-no-identification": {"rule": "sum"},
    "kif-weighted": {"rule": "weighted"},
    "kif-adaptive": {"rule": "adaptive", "temperature": 0.25},
    "kif-no-shared": {"rule": "no_shared"},
    "kif-tensor": {"scope": "tensor"},
}
TASKS = ("dbpedia", "amazon", "yahoo", "agnews")


def plan(args: argparse.Namespace, arm: str, seed: int) -> dict:
    """The plan of an arm and a seed."""
    options = ARMS[arm]
    total = args.rounds * (args.inner + args.outer)
    kif = options is not None and "replay" not in options
    methods = []
    if options is not None:
        methods = [
            {"kif": {**KEPT, "inner_steps": args.inner, "outer_steps": args.outer, **options}} if kif else options
        ]
    rows = args.rows - 1 if arm == "mixed" else args.rows
    tasks = [
        {
            "name": name, "train": str(args.data / f"{name}.train.jsonl"), "drop_options": True, "max_prompt_tokens": 72,
            "test": str(args.data / f"{name}.{'dev' if name == 'yahoo' else 'test'}.jsonl"), "test_rows": args.test_rows,
            "sft": {
                # The first task has no memory: it is the same plain training in every arm.
                "max_steps": args.rounds * args.inner if kif and i else total,
                "per_device_train_batch_size": rows if i else args.rows,
            },
        }
        for i, name in enumerate(TASKS)
    ]  # fmt: skip
    general = {
        "rows": str(args.general),
        "split": "train",
        "limit": 24,
        "metric": {"general_loss": {"max_length": 128}},
    }
    return {
        "model": {"path": args.model, "dtype": args.dtype},
        "output_dir": str(args.out / arm / f"seed{seed}"),
        "seed": seed,
        "data_seed": 0,
        "peft": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        "sft": {
            "learning_rate": args.learning_rate, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3,
            "gradient_checkpointing": False, "bf16": False, "use_cpu": not torch.cuda.is_available(),
            "disable_tqdm": True, "logging_steps": args.inner, "save_strategy": "steps", "save_steps": 10,
        },
        "methods": methods,
        "memory": {"policy": "class_balanced", "share": 0.02},
        "tasks": tasks,
        "evaluation": {"tasks": "seen", "base": False, "gauges": {"general": general}, "bootstrap": 0},
    }  # fmt: skip


def figures(results: dict, seconds: float) -> dict[str, float]:
    """A run's figures for the table."""
    scores, nll = results["matrix"]["scores"], results["nll"]["scores"]
    last = len(scores) - 1
    return {
        "OP": statistics.fmean(scores[last]),
        "BWT": statistics.fmean(scores[last][i] - scores[i][i] for i in range(last)),
        "old NLL": statistics.fmean(nll[last][:last]),
        "new NLL": nll[last][last],
        "learnt": statistics.fmean(scores[i][i] for i in range(last + 1)),
        "general": list(results["gauges"]["general"]["after"].values())[-1]["value"],
        "seconds": seconds,
    }


def main() -> None:
    """Run the arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="float32", help="bfloat16 if the processor supports it")
    parser.add_argument("--data", type=Path, required=True, help="folder of TASK.train.jsonl and TASK.test.jsonl")
    parser.add_argument("--general", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("kif-out"))
    parser.add_argument("--arms", nargs="+", default=["plain", "mixed", "kif"], choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--inner", type=int, default=8)
    parser.add_argument("--outer", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--test-rows", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    file = args.out / "compare.json"
    for seed in args.seeds:
        for arm in args.arms:
            begin = time.process_time()
            results = train_stream(plan(args, arm, seed)).results
            found = json.loads(file.read_text()) if file.is_file() else {}
            known = found.get(arm, {}).get(str(seed), {}).get("seconds")
            found.setdefault(arm, {})[str(seed)] = figures(results, known or time.process_time() - begin)
            file.write_text(json.dumps(found, indent=1))
            print(arm, seed, {k: round(v, 3) for k, v in found[arm][str(seed)].items()}, flush=True)
    for arm, seeds in json.loads(file.read_text()).items():
        names = next(iter(seeds.values()))
        print(
            f"{arm} ({len(seeds)} seeds)", {k: f"{statistics.fmean(r[k] for r in seeds.values()):.3f}" for k in names}
        )


if __name__ == "__main__":
    main()
