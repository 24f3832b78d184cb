"""The Biography experiment of Spurious Forgetting (arXiv 2501.13453, section 3) scaled down to one CPU core.

    python recipes/biography/run.py --seeds 2 3 4 --out biography-out

A tiny Llama reads biographies of 120 invented people, learns to answer questions about them (task 0), then about 60
new people (task 1): plainly, and with the embeddings and the two bottom blocks frozen. Scored at steps of task 1, and
while half of task 0 is trained on again (recovery), next to the control: the same half, trained on by the model that has only
read the biographies. Recovery on the other half shows that something was kept only if it beats that control.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from hf_continual import train_stream
from hf_continual.data.biography import biography_rows
from hf_continual.plots import plot_forgetting

OLD, NEW, HALF = 120, 60, 60
CURVE = [0, 5, 10, 15, 20, 30, 40, 60, 80, 100, 120, 150, 175, 200, 225, 250, 275, 300]
AGAIN = [0, 5, 10, 20, 30]
ARMS = {"sequential": [], "freeze-2": [{"freeze": {"bottom": 2}}]}


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


def plan(seed: int, folder: Path) -> dict:
    """Pretraining, task 0, task 1 in both ways, recovery of each, and the control; one tree."""

    def people(number: int, skip: int = 0, kind: str = "questions") -> dict:
        return {"biography": {"people_number": number, "skip": skip, "kind": kind, "seed": seed}}

    half = people(HALF)
    tasks = [
        {
            "name": "read", "train": people(OLD, kind="texts"),
            "sft": {"max_steps": 800, "learning_rate": 2e-3, "per_device_train_batch_size": 16, "warmup_steps": 0},
        },
        {"name": "old", "train": people(OLD), "test": people(OLD), "sft": {"max_steps": 120}},
        {"name": "fresh", "parent": "read", "train": half, "sft": {"max_steps": 30}, "curve": AGAIN},
    ]  # fmt: skip
    for arm, methods in ARMS.items():
        name = f"new-{arm}"
        tasks += [
            {
                "name": name, "parent": "old", "train": people(NEW, OLD), "test": people(NEW, OLD), "curve": CURVE,
                "methods": methods, "sft": {"max_steps": 300, "lr_scheduler_type": "constant_with_warmup"},
            },
            {"name": f"again-{arm}", "parent": name, "train": half, "sft": {"max_steps": 30}, "curve": AGAIN},
        ]  # fmt: skip
    return {
        "model": str(folder / "model"),
        "output_dir": str(folder / "run"),
        "seed": seed,
        "sft": {
            "learning_rate": 5e-4, "lr_scheduler_type": "linear", "warmup_steps": 10, "per_device_train_batch_size": 48,
            "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "steps", "save_steps": 100,
            "disable_tqdm": True, "logging_steps": 50, "max_length": 256,
        },
        "tasks": tasks,
        "evaluation": {
            "batch_size": 256,
            "bootstrap": 0,
            "gauges": {"half B": {"rows": people(HALF, HALF), "metric": "exact_match"}},
        },
    }  # fmt: skip


def measure(results: dict) -> dict:
    """The results of one seed."""
    curves = results["curves"]
    found: dict = {"fresh": {s: p["half B"]["value"] for s, p in curves["fresh"].items()}, "arms": {}}
    found["half B after reading and task 0"] = results["cells"]["old"]["half B"]["value"]
    for arm in ARMS:
        name = f"new-{arm}"
        curve = {int(s): (p["old"]["value"], p[name]["value"]) for s, p in curves[name].items()}
        recovery = {s: p["half B"]["value"] for s, p in curves[f"again-{arm}"].items()}
        found["arms"][arm] = {"curve": curve, "recovery": recovery}
    both = [s for s in CURVE if all(found["arms"][a]["curve"][s][1] >= 0.95 for a in ARMS)]
    found["matched step"] = min(both) if both else None
    return found


def main() -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("biography-out"))
    args = parser.parse_args()
    found = {}
    for seed in args.seeds:
        folder = args.out / f"seed{seed}"
        if not (folder / "model" / "config.json").is_file():
            make_model(folder / "model", seed)
        found[seed] = measure(train_stream(plan(seed, folder)).results)
    (args.out / "biography.json").write_text(json.dumps(found, indent=1))
    arms = {}
    for arm in ARMS:
        mean = {
            s: [statistics.fmean(f["arms"][arm]["curve"][s][k] for f in found.values()) for k in (0, 1)] for s in CURVE
        }
        arms[arm] = {
            "old people": [(s, v[0]) for s, v in mean.items()],
            "new people": [(s, v[1]) for s, v in mean.items()],
        }
    plot_forgetting(arms, [], title=f"Biography: while task 1 is learned, mean of {len(found)} seeds").savefig(
        args.out / "biography.png", dpi=150
    )
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
