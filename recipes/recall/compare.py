"""Is the merge worth it? RECALL compared with the uniform average, task arithmetic, TIES, magnitude-max, the last expert, and training in sequence.

    python recipes/recall/compare.py --model MODEL --data data/longseq --general data/general.heldout.jsonl

Four tasks. One expert (a LoRA adapter) per task, trained from the base model without the others; and one adapter that
learns the four tasks one after another. The experts are merged in several ways, and every result is scored on all
four tasks and by the loss of general text. If interrupted, the same command resumes; finished cells are not scored again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_continual import train_stream
from hf_continual.atomic_files import read_json, write_json
from hf_continual.data.columns import cut_prompts, without_options
from hf_continual.data.rows import load_rows
from hf_continual.evaluation.exact_match import teacher_forced
from hf_continual.evaluation.general import general_loss
from hf_continual.merging.methods.linear import merge_linear
from hf_continual.merging.methods.magnitude_max import magnitude_max
from hf_continual.merging.methods.recall.merge import merge_with_recall
from hf_continual.merging.methods.task_arithmetic import task_arithmetic
from hf_continual.merging.methods.ties import ties

TASKS = ("dbpedia", "amazon", "yahoo", "agnews")
ARMS = ("sequential training", "last expert", "uniform average", "recall", "task arithmetic, 0.5")  # --arms all: more
ROUTES = [
    *TASKS,
    *(f"then-{name}" for name in TASKS[1:]),
]  # four experts, and the sequence that continues from the first


def test_file(args: argparse.Namespace, task: str) -> Path:
    """Test rows; if none are published, the development rows."""
    file = args.data / f"{task}.test.jsonl"
    return file if file.is_file() else args.data / f"{task}.dev.jsonl"


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is trained, with the seeds as a sweep."""
    tasks = []
    for i, name in enumerate(ROUTES):
        task = name.removeprefix("then-")
        parent = "base" if name == task else ROUTES[0] if i == len(TASKS) else ROUTES[i - 1]
        tasks.append(
            {
                "name": name, "train": str(args.data / f"{task}.train.jsonl"), "train_rows": 128, "drop_options": True,
                "max_prompt_tokens": args.tokens, "parent": parent,
            }
        )  # fmt: skip
    return {
        "model": {"path": args.model, "dtype": "float32"},
        "output_dir": str(args.out / "trained"),
        "peft": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        "sft": {
            "learning_rate": 2e-3, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3,
            "per_device_train_batch_size": 4, "num_train_epochs": 1, "gradient_checkpointing": False, "bf16": False,
            "use_cpu": args.cpu, "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "steps", "save_steps": 8,
        },
        "tasks": tasks,
        "evaluation": {"base": False, "bootstrap": 0},
        "sweep": {"seeds": args.seeds},
    }  # fmt: skip


def merges(args: argparse.Namespace, seed: int) -> dict[str, Callable[[Path], Any]]:
    """Each way of merging, as a function of the output folder."""
    experts = [str(folder(args, seed, name)) for name in TASKS]
    rows = load_rows(str(args.data / f"{TASKS[-1]}.train.jsonl"))
    newest = cut_prompts(without_options(rows), args.tokens, AutoTokenizer.from_pretrained(args.model))
    calibration = [row["prompt"] + row["completion"] for row in newest]
    common = {"base": args.model, "progress": False, "overwrite": True}
    recall = {**common, "calibration": calibration, "pool_size": 64, "seed": seed, "calibration_dtype": "float32"}
    return {
        "uniform average": lambda out: merge_linear(experts, out, **common),
        "recall": lambda out: merge_with_recall(experts, out, **recall),
        "recall, T = 0.1": lambda out: merge_with_recall(experts, out, **{**recall, "temperature": 0.1}),
        "task arithmetic, 0.5": lambda out: task_arithmetic(experts, out, scale=0.5, **common),
        "ties": lambda out: ties(experts, out, dtype="float32", **common),
        "magnitude-max": lambda out: magnitude_max(experts, out, dtype="float32", **common),
    }


def folder(args: argparse.Namespace, seed: int, name: str) -> Path:
    """Where a trained adapter is."""
    return args.out / "trained" / f"seed{seed}" / f"task-{ROUTES.index(name):02d}-{name}"


def score(args: argparse.Namespace, model_folder: Path | None) -> dict[str, float]:
    """Exact match and answers' loss on the four tasks, and the loss of general text."""
    full = model_folder is not None and not (model_folder / "adapter_config.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(model_folder if full else args.model, dtype=torch.float32)
    if model_folder is not None and not full:
        model = PeftModel.from_pretrained(model, model_folder)
    tokenizer, found = AutoTokenizer.from_pretrained(args.model), {}
    model = model.to("cpu" if args.cpu else "cuda")
    for task in TASKS:
        rows = load_rows(str(test_file(args, task))).select(range(args.rows))
        scored = teacher_forced(model, tokenizer, cut_prompts(without_options(rows), args.tokens, tokenizer))
        found[task] = scored.score.value
        found[f"{task} nll"] = scored.nll.value
    general = load_rows(args.general).select(range(12))
    found["general loss"] = general_loss(model, tokenizer, general, max_length=128).score.value
    return found


def main() -> None:
    """Train, merge, score, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, required=True, help="folder of TASK.train.jsonl and TASK.test.jsonl")
    parser.add_argument("--general", required=True, help="general text to measure the loss of, rows with a text")
    parser.add_argument("--out", type=Path, default=Path("recall-out"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=48, help="test rows of each task")
    parser.add_argument("--tokens", type=int, default=48, help="tokens to which prompts are cut")
    parser.add_argument(
        "--arms", nargs="+", default=list(ARMS), help="arms to score; all: also temperature 0.1, TIES, ..."
    )
    parser.add_argument("--cpu", action="store_true", help="not on a GPU")
    args = parser.parse_args()
    file = args.out / "compare.json"
    found: dict[str, dict[str, dict[str, float]]] = read_json(file) if file.is_file() else {}

    def keep(arm: str, seed: str, model_folder: Path | None) -> None:
        wanted = arm in (*args.arms, "base") or "all" in args.arms
        if wanted and seed not in found.setdefault(arm, {}):
            found[arm][seed] = score(args, model_folder)
            write_json(file, found)

    keep("base", "-", None)
    for seed in args.seeds:
        train_stream(plan(args), only=f"seed{seed}")
        keep("sequential training", str(seed), folder(args, seed, ROUTES[-1]))
        keep("last expert", str(seed), folder(args, seed, TASKS[-1]))
        for arm, merge in merges(args, seed).items():
            if str(seed) not in found.get(arm, {}) and (arm in args.arms or "all" in args.arms):
                merge(args.out / "merged")
                keep(arm, str(seed), args.out / "merged")
        for name in TASKS[:-1]:
            keep(f"expert {name}", str(seed), folder(args, seed, name))
    print(json.dumps(table(found), indent=1))


def table(found: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, str]]:
    """Means over seeds, lowest and highest in brackets."""
    rows = {}
    for arm, seeds in found.items():
        runs = list(seeds.values())
        figures = {
            "exact match, all tasks": [statistics.fmean(r[t] for t in TASKS) for r in runs],
            "old tasks": [statistics.fmean(r[t] for t in TASKS[:-1]) for r in runs],
            "newest task": [r[TASKS[-1]] for r in runs],
            "answers' loss, all tasks": [statistics.fmean(r[f"{t} nll"] for t in TASKS) for r in runs],
            "answers' loss, old tasks": [statistics.fmean(r[f"{t} nll"] for t in TASKS[:-1]) for r in runs],
            "general loss": [r["general loss"] for r in runs],
        }
        rows[arm] = {k: f"{statistics.fmean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for k, v in figures.items()}
    return rows


if __name__ == "__main__":
    main()
