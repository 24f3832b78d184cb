"""The Spurious-Forgetting experiment (arXiv 2501.13453, section 3) with its own architecture, on a GPU.

    python recipes/proof/run.py --preset gpu-biography --out OUT

Several of the same command share the work: one reads the biographies and learns task 0, then each takes arms. A killed
command resumes at its last checkpoint while reading, otherwise at the last finished task. One result file per arm and seed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock
from plans import read
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast, set_seed

from hf_continual import train_stream
from hf_continual.atomic_files import write_json, write_lines
from hf_continual.data.biography import biography_rows
from hf_continual.stream.command import set_up

HERE = Path(__file__).parent
LEARNED = 0.95  # of the new questions: the step at which arms are compared
OLD, UNSHOWN = (
    "old",
    "old, not shown again",
)  # all old questions; those about the half of the people that is never replayed
# Exact match on the old questions after task 1, in %, as published.
PUBLISHED = {
    "seq": 11.2, "freeze-7": 39.7, "freeze-7, early stop": 44.2, "replay-20": 76.9,
}  # fmt: skip


def small_recipe() -> ModuleType:
    """recipes/biography/run.py, whose arms these are; its name is that of this folder's run.py."""
    spec = importlib.util.spec_from_file_location("small_biography", HERE.parent / "biography" / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_model(folder: Path, size: Mapping[str, Any], seed: int) -> None:
    """A GPT-NeoX with random weights and a tokenizer of the whole words that the people's texts hold."""
    if (folder / "config.json").is_file():
        return
    number = size["old"] + size["new"]
    texts = biography_rows(number, "texts", versions=6, seed=seed)["text"]
    asked = [row["prompt"] + row["completion"] for row in biography_rows(number, seed=seed)]
    split = pre_tokenizers.Whitespace()
    words = sorted({word for text in [*texts, *asked] for word, _ in split.pre_tokenize_str(text)})
    known = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    set_seed(seed)
    shape, wide = size["model"], size["model"]["channels"]
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=-(-len(known) // 64) * 64, hidden_size=wide, num_hidden_layers=shape["layers"], intermediate_size=4 * wide,
            num_attention_heads=shape["heads"], max_position_embeddings=2048, pad_token_id=0, eos_token_id=1, bos_token_id=1,
        )
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def rows(size: Mapping[str, Any], seed: int, who: str, kind: str = "questions") -> dict[str, Any]:
    """Rows about the old or the new people, as a plan names them."""
    skip = 0 if who == "old" else size["old"]
    return {"biography": {"people_number": size[who], "skip": skip, "kind": kind, "seed": seed, "versions": 6 if kind == "texts" else 5}}  # fmt: skip


def methods_of(arm: str, size: Mapping[str, Any], seed: int, out: Path) -> list[dict[str, Any]]:
    """The methods of an arm; replayed rows are drawn from the first half of the people and written to a file."""
    name, _, number = arm.partition("-")
    if name == "freeze":
        return [{"freeze": {"bottom": int(number)}}]
    if name == "ewc":
        return [{"ewc": {"weight": float(number)}}]
    if name == "replay":
        file = out / "rows" / f"{arm}-seed{seed}.jsonl"
        half = list(biography_rows(size["old"] // 2, seed=seed))
        most = min(len(half), round(int(number) / 100 * 6 * size["old"]))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_lines(file, random.Random(seed).sample(half, most))
        return [{"replay": {"rows": str(file), "per_batch": max(1, size["task"]["batch"] // 2)}}]
    return small_recipe().ARMS["sequential" if arm == "seq" else arm]


def plan(size: Mapping[str, Any], seed: int, model: Path, folder: Path) -> dict[str, Any]:
    """What all plans of the experiment share."""
    task = size["task"]
    gauges = {}
    for name, skip in ((OLD, 0), (UNSHOWN, size["old"] // 2)):
        asked = {"biography": {"people_number": size["old"] - skip, "skip": skip, "seed": seed}}
        gauges[name] = {"rows": asked, "metric": "exact_match", "limit": size["scored"]}
    return {
        "model": str(model), "output_dir": str(folder), "seed": seed,
        "sft": {
            "learning_rate": task["rate"], "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1 + task["new_steps"] // 50,
            "per_device_train_batch_size": task["batch"], "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True,
            "logging_steps": 200, "max_length": 256, **size["dtype"],
        },
        "evaluation": {"batch_size": 512, "bootstrap": 0, "tasks": "seen", "gauges": gauges},
    }  # fmt: skip


def base_plan(size: Mapping[str, Any], seed: int, out: Path) -> dict[str, Any]:
    """Reading the biographies of the old people, and the questions about them, which is task 0."""
    how = size["read"]
    reading = {
        "max_steps": how["steps"], "per_device_train_batch_size": how["batch"], "max_length": how["length"], "packing": True,
        "learning_rate": how["rate"], "warmup_steps": how["warmup"], "lr_scheduler_type": "cosine",
        "save_strategy": "steps", "save_steps": max(1, how["steps"] // 8), "save_total_limit": 1,
    }  # fmt: skip
    return {
        **plan(size, seed, out / f"model-seed{seed}", out / f"base-seed{seed}"),
        "tasks": [
            {"name": "read", "train": rows(size, seed, "old", "texts"), "sft": reading},
            old_task(size, seed),
        ],
    }


def old_task(size: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Task 0; the gauges score it."""
    return {"name": "old", "train": rows(size, seed, "old"), "sft": {"max_steps": size["task"]["old_steps"]}}


def arm_plan(arm: str, size: Mapping[str, Any], seed: int, out: Path) -> dict[str, Any]:
    """Task 1 with an arm, from the model that learned task 0; EWC and LAMOL learn task 0 as well, with the method."""
    base = out / f"base-seed{seed}"
    own = arm.partition("-")[0] in small_recipe().FROM_TASK_0
    new = {
        "name": "new", "train": rows(size, seed, "new"), "test": rows(size, seed, "new"), "test_rows": size["scored"],
        "curve": size["curve"], "sft": {"max_steps": size["task"]["new_steps"]},
    }  # fmt: skip
    start = base / ("task-00-read" if own else "task-01-old")
    methods = methods_of(arm, size, seed, out)
    return {
        **plan(size, seed, start, out / "arms" / f"{arm}-seed{seed}"),
        "tasks": [old_task(size, seed), new] if own else [new],
        **({"methods": methods} if methods else {}),
    }


def result(about: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """One arm's result: exact match (0 to 1) on old and new questions by step of task 1, and after the method's own ending."""
    curve = {
        int(step): {OLD: point[OLD]["value"], UNSHOWN: point[UNSHOWN]["value"], "new": point["new"]["value"]}
        for step, point in results["curves"]["new"].items()
    }
    cell = results["cells"]["new"]
    first = min((step for step, point in curve.items() if point["new"] >= LEARNED), default=None)
    end = {name: cell[name]["value"] for name in (OLD, UNSHOWN, "new")}
    return {"format": 1, **about, "curve": curve, "end": end, "learned_at": first, "versions": results["versions"]}


def table(found: list[dict[str, Any]]) -> str:
    """Arms by what they keep, in %, next to what the paper reports."""
    lines = [
        "| arm | seed | old, end | not shown again, end | new, end | first step with new at 95 %: old | published |",
        "|---|---|---|---|---|---|---|",
    ]
    for got in sorted(found, key=lambda r: -r["end"][OLD]):
        at = got["learned_at"]
        early = "not reached" if at is None else f"{at}: {100 * got['curve'][str(at)][OLD]:.1f}"
        end = " | ".join(f"{100 * got['end'][name]:.1f}" for name in (OLD, UNSHOWN, "new"))
        said = [str(PUBLISHED[name]) for name in (got["arm"], f"{got['arm']}, early stop") if name in PUBLISHED]
        lines.append(f"| `{got['arm']}` | {got['seed']} | {end} | {early} | {'; '.join(said) or '-'} |")
    return "\n".join(lines) + "\n"


def run_arms(args: argparse.Namespace, size: Mapping[str, Any], seed: int) -> int:
    """Take arms of a seed that no other process has taken; returns how many this one finished."""
    done, results = 0, args.out / "results"
    for arm in [a for a in size["arms"] if args.arms is None or a in args.arms]:
        file = results / f"{args.preset}-{arm}-seed{seed}.json"
        from run import taken

        with taken(args.out / "locks" / f"{file.name}.lock") as mine:
            if not mine or file.is_file():
                continue
            print(f"{arm}, seed {seed}", flush=True)
            about = {
                "preset": args.preset,
                "arm": arm,
                "seed": seed,
                "size": dict(size),
                "methods": methods_of(arm, size, seed, args.out),
            }
            trained = train_stream(arm_plan(arm, size, seed, args.out)).results
            write_json(file, result(about, trained))
            done += 1
    return done


def main(args: argparse.Namespace) -> int:
    """Run a preset of biography.yaml.

    Args:
        args: `preset`, `out` and `arms` of run.py.

    Returns:
        The exit code.
    """
    size = read("biography")[args.preset]
    set_up(quiet=True, as_json=False, bars=False)
    results = args.out / "results"
    results.mkdir(parents=True, exist_ok=True)
    for seed in size["seeds"]:
        with FileLock(args.out / f"base-seed{seed}.lock"):  # the others wait here, and find it finished
            make_model(args.out / f"model-seed{seed}", size, seed)
            train_stream(base_plan(size, seed, args.out))
        run_arms(args, size, seed)
    found = [json.loads(f.read_text(encoding="utf-8")) for f in sorted(results.glob(f"{args.preset}-*.json"))]
    (args.out / "biography.md").write_text(table(found), encoding="utf-8")
    print(table(found))
    return 0
