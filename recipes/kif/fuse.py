"""Fuse two adapters that continued from one earlier adapter, without training: kif_fuse compared with averaging.

    python recipes/kif/fuse.py --out fuse-out                       # SmolLM2-135M of `make demo`; or --model FOLDER

An adapter learns the birth cities of invented people. Two adapters continue from it separately: one learns fields of study, one
employers. They are fused by `kif_fuse`, with importance from 24 rows of each, and by averaging; every result is scored on all
three. If interrupted, the same command resumes.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from hf_continual import ContinualTrainer, kif_fuse
from hf_continual.atomic_files import read_json, write_json
from hf_continual.data.biography import people, questions
from hf_continual.demo.model import embedded_model
from hf_continual.evaluation.exact_match import teacher_forced

TASKS = {"cities": "birth_city", "fields": "major", "employers": "company"}
WAYS: dict[str, dict[str, Any]] = {
    "kif_fuse": {},
    "kif_fuse paper": {"rule": "paper"},
    "kif_fuse adaptive": {"rule": "adaptive"},
    "kif_fuse top 50 %": {"top_share": 0.5},
}


def learn(args: argparse.Namespace, rows: Dataset, seed: int, folder: Path, parent: Path | None = None) -> Path:
    """Train an adapter, from another one if there is one."""
    if not (folder / "adapter_model.safetensors").is_file():
        model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        if parent is not None:
            model = PeftModel.from_pretrained(model, parent, is_trainable=True)
        config = SFTConfig(
            str(folder / "run"), per_device_train_batch_size=8, max_steps=args.steps, learning_rate=1e-3,
            lr_scheduler_type="constant_with_warmup", warmup_steps=3, save_strategy="no", report_to=[], seed=seed,
            gradient_checkpointing=False, bf16=False, use_cpu=args.cpu, disable_tqdm=True,
        )  # fmt: skip
        trainer = ContinualTrainer(
            model, config, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(args.model),
            peft_config=None if parent else LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        )  # fmt: skip
        trainer.train()
        trainer.save_model(str(folder))
    return folder


def average(base: Path, models: list[Path], scale: float, folder: Path) -> Path:
    """base + scale * (sum of each factor's changes): task arithmetic on the factors themselves."""
    folder.mkdir(parents=True, exist_ok=True)
    anchor, *others = (load_file(m / "adapter_model.safetensors") for m in (base, *models))
    made = {n: t + scale * sum(o[n] - t for o in others) for n, t in anchor.items()}
    save_file(made, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text((base / "adapter_config.json").read_text())
    return folder


def main() -> None:
    """Train, fuse, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; by default the model of `make demo`")
    parser.add_argument("--out", type=Path, default=Path("fuse-out"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--people", type=int, default=24)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    args.model = args.model or str(embedded_model())
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    scored: dict[str, dict[str, list[float]]] = {}
    for seed in args.seeds:
        out, n = args.out / f"seed-{seed}", args.people
        who = people(3 * n, seed)
        rows = {t: questions(who[i * n : (i + 1) * n], [a]) for i, (t, a) in enumerate(TASKS.items())}
        base = learn(args, rows["cities"], seed, out / "cities")
        fields, employers = (learn(args, rows[t], seed, out / t, base) for t in ("fields", "employers"))
        results = {"cities": base, "fields": fields, "employers": employers}
        for way, options in WAYS.items():
            results[way] = out / way.replace(" ", "-").replace("%", "percent")
            if not results[way].is_dir():
                kif_fuse(
                    base, fields, results[way], old=employers, base_model=args.model,
                    calibration_new=rows["fields"], calibration_old=rows["employers"], **options,
                )  # fmt: skip
        results["half of both"] = average(base, [fields, employers], 0.5, out / "half")
        results["sum of both"] = average(base, [fields, employers], 1.0, out / "sum")
        file = out / "scores.json"
        found = read_json(file) if file.is_file() else {}
        model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(args.model), base)
        for name, folder in results.items():
            if name not in found:
                set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
                answers = {t: teacher_forced(model, tokenizer, rows[t]) for t in TASKS}
                found[name] = {t: a.nll.value for t, a in answers.items() if a.nll}
                write_json(file, found)
            for task, value in found[name].items():
                scored.setdefault(name, {}).setdefault(task, []).append(value)
    print("| answer NLL, mean of seeds |", " | ".join(TASKS), "| mean |")
    print("|---" * (len(TASKS) + 2) + "|")
    for name, by_task in scored.items():
        means = [statistics.mean(by_task[t]) for t in TASKS]
        print(f"| {name} |", " | ".join(f"{m:.2f}" for m in means), f"| {statistics.mean(means):.2f} |")


if __name__ == "__main__":
    main()
