"""Does the constraint hold? Plain fine-tuning, general replay, and general replay with TM, at equal steps and tokens.

    python recipes/gere/compare.py --task data/dbpedia --general data/general.train.jsonl --heldout data/general.heldout.jsonl

Every arm and seed learns one task. Plain fine-tuning sees as many task rows in place of the general ones, so
that steps and tokens are equal. Measured: the task, the loss of general text that was not trained on, and the fraction of
units that have left the interval of their recorded state, on the replayed samples and on held-out text.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer

from hf_continual import train_stream
from hf_continual.data.rows import load_rows
from hf_continual.methods.gere import activation_states
from hf_continual.methods.gere.margin import margin
from hf_continual.methods.gere.states import record
from hf_continual.stream.models import load_finished
from hf_continual.stream.read_plan import read_plan
from hf_continual.tensors.reference import last_hidden

ARMS = {
    "sft": None,
    "replay": {"constraint": "none"},
    "tm-100": {"weight": 100.0},
    "tm-dynamic": {"weight": "dynamic"},
    "tm-1": {"weight": 1.0},
    "tm-10": {"weight": 10.0},
}


def plan(args: argparse.Namespace, arm: str) -> dict:
    """The plan of an arm; its seeds are a sweep."""
    options = ARMS[arm]
    rows = args.rows if options is not None else args.rows + args.general_rows
    methods = []
    if options is not None:
        gere = {
            "rows": args.general,
            "per_batch": args.general_rows,
            "num_samples": args.samples,
            "max_length": args.length,
        }
        methods = [{"gere": {**gere, "cache_dir": str(args.out / "cache"), **options}}]
    general = {"rows": args.heldout, "split": "train", "limit": 24, "metric": {"general_loss": {"max_length": 128}}}
    return {
        "model": {"path": args.model, "dtype": args.dtype},
        "output_dir": str(args.out / arm),
        "peft": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        "sft": {
            "learning_rate": args.learning_rate, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3,
            "per_device_train_batch_size": rows, "max_steps": args.steps, "gradient_checkpointing": False, "bf16": False,
            "use_cpu": not torch.cuda.is_available(), "disable_tqdm": True, "logging_steps": 8, "save_strategy": "no",
        },
        "methods": methods,
        "tasks": [
            {
                "name": "task", "train": f"{args.task}.train.jsonl", "test": f"{args.task}.test.jsonl", "test_rows": 100,
                "drop_options": True, "max_prompt_tokens": args.length,
            }
        ],
        "evaluation": {"gauges": {"general": general}, "bootstrap": 0},
        "sweep": {"seeds": args.seeds},
    }  # fmt: skip


def violations(args: argparse.Namespace, folder: Path | None, texts: list[str], name: str) -> float:
    """Fraction of units outside the interval of their state, of a task's model."""
    read, _ = read_plan(plan(args, "sft"))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = [ids[: args.length] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    tokens = [ids for ids in tokens if len(ids) > 1]
    with torch.no_grad():
        base = load_finished(read, None)
        made = record(args.out / f"{name}.safetensors", {"texts": texts}, tokens, partial(last_hidden, base), 1.0, True)
        model = load_finished(read, folder)
        count = total = 0.0
        for i, ids in enumerate(tokens):
            states = activation_states(made.row(i, len(ids), "hidden"), made.low_D, made.high_D)
            hidden = last_hidden(model, ids)
            count += float(margin(hidden, states, made.low_D, made.high_D, torch.ones(len(ids)))[1])
            total += hidden.numel()
    return count / total


def main() -> None:
    """Run the arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument(
        "--task", required=True, help="path of TASK.train.jsonl and TASK.test.jsonl without the suffixes"
    )
    parser.add_argument("--general", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--out", type=Path, default=Path("gere-out"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--general-rows", type=int, default=2)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--length", type=int, default=72)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--dtype", default="bfloat16", help="float32 if the processor only emulates bfloat16")
    args = parser.parse_args()
    replayed = load_rows(args.general)["text"][: args.samples][:60]
    unseen = load_rows(args.heldout)["text"][:60]
    found = {}
    for arm in args.arms:
        runs = train_stream(plan(args, arm)).results["runs"]
        found[arm] = {}
        for seed in args.seeds:
            run, folder = runs[f"seed{seed}"], args.out / arm / f"seed{seed}" / "task-00-task"
            found[arm][seed] = {
                "task": run["matrix"]["scores"][0][0],
                "task nll": run["nll"]["scores"][0][0],
                "general loss, change": run["gauge_changes"]["general"],
                "violating units, replayed": violations(args, folder, replayed, "replayed"),
                "violating units, unseen": violations(args, folder, unseen, "unseen"),
            }
        (args.out / f"compare-{'-'.join(args.arms)}.json").write_text(json.dumps(found, indent=1))
    for arm, seeds in found.items():
        figures = {k: [run[k] for run in seeds.values()] for k in next(iter(seeds.values()))}
        print(arm, {k: f"{statistics.fmean(v):.4f} ({min(v):.4f} to {max(v):.4f})" for k, v in figures.items()})


if __name__ == "__main__":
    main()
