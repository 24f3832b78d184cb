"""The Biography experiment of Spurious Forgetting (arXiv 2501.13453, section 3) scaled down to one CPU core.

    python recipes/biography/run.py --seeds 2 3 4 --out biography-out                      # plain, and frozen
    python recipes/biography/run.py --seeds 2 --arms all --out biography-arms              # the systems of the paper's table
    python recipes/biography/run.py --seeds 20 --arms all --tune --out biography-tune      # what their options were chosen from

A tiny Llama reads biographies of 120 invented people, learns to answer questions about them (task 0), then about 60
new people (task 1): plainly, with the embeddings and the two bottom blocks frozen, and with the methods that the paper
compares. Scored at steps of task 1, and while half of task 0 is trained on again (recovery), next to the control: the same half,
trained on by the model that has only read the biographies. Recovery on the other half shows that something was kept only if it
beats that control. Finished parts are not repeated: the same command resumes, and more arms continue from there.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from hf_continual import train_stream
from hf_continual.data.biography import biography_rows
from hf_continual.plots import plot_forgetting

OLD, NEW, HALF = 120, 60, 60
CURVE = [0, 10, 20, 40, 60, 80, 100, 150, 200, 300]
AGAIN = [0, 10, 30]
LEARNED = 0.95  # of the new task: where arms are compared, and what a tuned one must reach

# Words of the biographies that no question holds: the tokenizer has only these words.
MARKERS = {"gen_marker": "certificate", "answer_marker": "salary"}
PROJECTION = {"runs": 10, "steps": 15, "since": 10}  # the paper's 10 runs, to where the old answers collapse
ARMS: dict[str, list[dict[str, Any]]] = {
    "sequential": [],
    "freeze-2": [{"freeze": {"bottom": 2}}],
    "replay-20": [{"replay": {"share": 0.2, "per_batch": 24}}],  # the paper's: 24 old rows with the 48 of each batch
    "replay-50": [{"replay": {"share": 0.5, "per_batch": 24}}],
    "lamol": [{"lamol": {"gamma": 0.2, **MARKERS}}],
    "ewc": [{"ewc": {"weight": 1e8}}],
    "recadam": [{"recadam": {"anneal": "none", "pull": 0.01}}],
    "task-vector": [{"task_vector": {"at": 0.5, "alpha": 0.22}}],
    "projection": [{"gradient_projection": {**PROJECTION, "layers": "attention"}}],
}
# Arms whose method must have seen task 0 as well, and learn it with the method.
FROM_TASK_0 = ("ewc", "lamol")
TUNED = 150  # steps of task 1 with `--tune`
# Tried with `--tune`, on a seed that is not reported.
TRIED: dict[str, dict[str, list[Any]]] = {
    "ewc": {"weight": [1e4, 1e6, 1e8]},
    "recadam": {"pull": [0.001, 0.01]},
    "task-vector": {"alpha": [0.22, 0.5]},
    "projection": {"layers": ["attention", "all"]},
}


def make_model(folder: Path, seed: int) -> None:
    """A Llama of 4 layers and 128 channels with random weights, and a tokenizer of whole words."""
    texts = biography_rows(OLD + NEW, "texts", seed=seed)["text"]
    asked = [r["prompt"] + r["completion"] for r in biography_rows(OLD + NEW, "questions", seed=seed)]
    split = pre_tokenizers.Whitespace()
    words = sorted({word for text in [*texts, *asked] for word, _ in split.pre_tokenize_str(text)})
    made = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *words])}, unk_token="<unk>")
    )
    made.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    set_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=1,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tried(arms: dict[str, Any]) -> dict[str, Any]:
    """The arms with each option that is tried, such as ``ewc 1000.0``; arms without options as they are."""
    made: dict[str, Any] = {}
    for arm, methods in arms.items():
        for option, values in TRIED.get(arm, {}).items():
            for value in values:
                made[f"{arm} {value}"] = [{kind: {**given, option: value}} for kind, given in methods[0].items()]
        if arm not in TRIED:
            made[arm] = methods
    return made


def with_rows(methods: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The methods, with rows where Replay has a share of them: drawn from the half that is never scored."""
    made = []
    for method in methods:
        if "replay" in method:
            given = dict(method["replay"])
            half, number = list(biography_rows(HALF, seed=seed)), round(given.pop("share") * 6 * OLD)
            method = {"replay": {"rows": random.Random(seed).sample(half, number), **given}}
        made.append(method)
    return made


def people(seed: int, number: int, skip: int = 0, kind: str = "questions") -> dict:
    """Rows about invented people, as a plan names them."""
    return {"biography": {"people_number": number, "skip": skip, "kind": kind, "seed": seed}}


def arm_tasks(seed: int, arms: dict[str, Any], old: dict, half: dict, tune: bool) -> list[dict]:
    """Task 1 with each arm, recovery of each, and task 0 once more for arms whose method must have seen it."""
    tasks: list[dict] = []
    new = {"train": people(seed, NEW, OLD), "test": people(seed, NEW, OLD), "curve": [] if tune else CURVE}
    sft = {"max_steps": TUNED if tune else 300, "lr_scheduler_type": "constant_with_warmup"}
    for arm, given in arms.items():
        methods, name, parent = with_rows(given, seed), f"new-{arm}", parent_of(arm)
        if parent not in {"old", *(task["name"] for task in tasks)}:
            tasks.append({"name": parent, "parent": "read", **old, "methods": methods})
        tasks.append({"name": name, "parent": parent, **new, "methods": methods, "sft": sft})
        if not tune:
            tasks.append({"name": f"again-{arm}", "parent": name, **half})
    return tasks


def plan(seed: int, folder: Path, arms: dict[str, Any], tune: bool = False) -> dict:
    """Pretraining, task 0, the control, and `arm_tasks`; one tree."""
    old = {"train": people(seed, OLD), "test": people(seed, OLD), "sft": {"max_steps": 120}}
    half = {"train": people(seed, HALF), "sft": {"max_steps": 30}, "curve": AGAIN}
    return {
        "model": str(folder / "model"),
        "output_dir": str(folder / "run"),
        "seed": seed,
        "sft": {
            "learning_rate": 5e-4, "lr_scheduler_type": "linear", "warmup_steps": 10, "per_device_train_batch_size": 48,
            "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "steps", "save_steps": 100,
            "disable_tqdm": True, "logging_steps": 50, "max_length": 256,
        },
        "tasks": [
            {
                "name": "read", "train": people(seed, OLD, kind="texts"),
                "sft": {"max_steps": 800, "learning_rate": 2e-3, "per_device_train_batch_size": 16, "warmup_steps": 0},
            },
            {"name": "old", **old},
            {"name": "fresh", "parent": "read", **half},
            *arm_tasks(seed, arms, old, half, tune),
        ],
        "evaluation": {
            "batch_size": 256,
            "bootstrap": 0,
            "gauges": {"half B": {"rows": people(seed, HALF, HALF), "metric": "exact_match"}},
        },
    }  # fmt: skip


def parent_of(arm: str) -> str:
    """Task 0 as the arm learned it."""
    kind = arm.split()[0]
    return f"old-{kind}" if kind in FROM_TASK_0 else "old"


def measure(results: dict, arms: dict[str, Any]) -> dict:
    """The results of one seed."""
    curves, cells = results["curves"], results["cells"]
    found: dict = {"fresh": {s: p["half B"]["value"] for s, p in curves["fresh"].items()}, "arms": {}}
    found["half B after reading and task 0"] = cells["old"]["half B"]["value"]
    for arm in arms:
        name, old = f"new-{arm}", parent_of(arm)
        curve = {int(s): (p[old]["value"], p[name]["value"], p["half B"]["value"]) for s, p in curves[name].items()}
        recovery = {s: p["half B"]["value"] for s, p in curves[f"again-{arm}"].items()}
        # What a method does when the task ends is in the last two, not in the curve.
        found["arms"][arm] = {
            "curve": curve,
            "recovery": recovery,
            "before": cells[old]["half B"]["value"],
            **end(cells, arm),
        }
    both = [s for s in CURVE if all(found["arms"][a]["curve"][s][1] >= LEARNED for a in arms)]
    found["matched step"] = min(both) if both else None
    return found


def end(cells: dict, arm: str) -> dict[str, float]:
    """Exact match of the finished arm: the old half that no arm is shown again, and the new questions."""
    cell = cells[f"new-{arm}"]
    return {"kept": cell["half B"]["value"], "new": cell[f"new-{arm}"]["value"]}


def table(found: dict) -> str:
    """The arms of one seed as a table, per cent of the old half that is not shown again, and of the new questions."""
    lines = [
        "| arm | old, step 20 | old, new at step 300 | first step with new at 95 %: old | recovered, 10 and 30 steps |"
    ]
    lines.append("|---|---|---|---|---|")
    for arm, got in found["arms"].items():
        curve, again = got["curve"], got["recovery"]
        first = next((s for s in CURVE if curve[s][1] >= LEARNED), None)
        at = "not reached" if first is None else f"{first}: {100 * curve[first][2]:.0f}"
        lines.append(
            f"| {arm} | {100 * curve[20][2]:.0f} | {100 * got['kept']:.0f}, {100 * got['new']:.0f} | {at} | "
            f"{100 * again['10']:.0f}, {100 * again['30']:.0f} |"
        )
    return "\n".join(lines)


def tune(seeds: list[int], out: Path, arms: dict[str, Any]) -> None:
    """Try options on the seeds, and print what each gives.

    Chosen is what keeps most of the old half, among the options of an arm with which the new task is learned; if it is with none,
    the one that learns most of it.
    """
    grid = tried(arms)
    cells = [run_seed(seed, out, grid, tune=True)["cells"] for seed in seeds]
    ends = {name: {k: statistics.fmean(end(cell, name)[k] for cell in cells) for k in ("kept", "new")} for name in grid}
    for arm in arms:
        tries = {name: got for name, got in ends.items() if name.split()[0] == arm}
        best = max(tries, key=lambda name: (min(ends[name]["new"], LEARNED), ends[name]["kept"]))
        for name, got in tries.items():
            mark = "  chosen" if name == best else ""
            print(f"{name:24} old {100 * got['kept']:5.1f}   new {100 * got['new']:5.1f}{mark}")


def run_seed(seed: int, out: Path, arms: dict[str, Any], tune: bool = False) -> dict:
    """Train whatever is missing of a seed; return its results."""
    folder = out / f"seed{seed}"
    if not (folder / "model" / "config.json").is_file():
        make_model(folder / "model", seed)
    return train_stream(plan(seed, folder, arms, tune)).results


def plot(found: dict[int, dict], arms: dict[str, Any], out: Path) -> None:
    """The curves, mean of the seeds, four arms to a figure."""
    curves = {}
    for arm in arms:
        mean = {
            s: [statistics.fmean(f["arms"][arm]["curve"][s][k] for f in found.values()) for k in (0, 1)] for s in CURVE
        }
        curves[arm] = {
            "old people": [(s, v[0]) for s, v in mean.items()],
            "new people": [(s, v[1]) for s, v in mean.items()],
        }
    which = f"mean of {len(found)} seeds" if len(found) > 1 else "one seed"
    title = f"Biography: while task 1 is learned, {which}"
    for i in range(0, len(curves), 4):
        name = f"biography-{i // 4 + 1}.png" if i else "biography.png"
        plot_forgetting(dict(list(curves.items())[i : i + 4]), [], title=title).savefig(out / name, dpi=150)


def main() -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, "all"], default=["sequential", "freeze-2"])
    parser.add_argument(
        "--tune", action="store_true", help="try the options of TRIED instead; with a folder of its own"
    )
    parser.add_argument("--out", type=Path, default=Path("biography-out"))
    args = parser.parse_args()
    arms = {arm: methods for arm, methods in ARMS.items() if arm in args.arms or "all" in args.arms}
    if args.tune:
        tune(args.seeds, args.out, arms)
        return
    found = {seed: measure(run_seed(seed, args.out, arms), arms) for seed in args.seeds}
    (args.out / "biography.json").write_text(json.dumps(found, indent=1))
    plot(found, arms, args.out)
    print(json.dumps(found, indent=1))
    for seed, got in found.items():
        control = ", ".join(f"{100 * got['fresh'][step]:.0f}" for step in ("10", "30"))
        print(f"\nseed {seed}; the control after 10 and 30 steps: {control}\n{table(got)}")


if __name__ == "__main__":
    main()
