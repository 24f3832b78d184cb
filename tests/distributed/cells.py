"""Method x mode x weights, each trained: `python -m tests.distributed.cells MODE FOLDER CELLS` under torchrun.

A cell is ``method:weights``. Process 0 writes ``FOLDER/MODE.pt``: the result of each cell, straight and resumed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

MODE = sys.argv[1] if __name__ == "__main__" else "one process"

if MODE not in ("one process", "DDP"):
    from tests.methods import fsdp_on_cpu  # noqa: F401 - must come before any Accelerator
if MODE.startswith("ZeRO"):
    import deepspeed

    # Otherwise it is compiled at first use, for minutes; gloo does not need it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

import datasets
import torch
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_continual import KIF, MIGU, ContinualConfig, ContinualTrainer, GeRe, OLoRA, RecAdam, Replay
from hf_continual.methods.table import TABLE
from tests import toy
from tests.methods import covering

# They only act after an earlier task, and train its weights further.
FURTHER = tuple(n for n in TABLE if getattr(covering.module(n), "NEEDS_PREDECESSOR", False))
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
FSDP = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "reshard_after_forward": True,
        "state_dict_type": "FULL_STATE_DICT",
    },
}


def zero(stage: int) -> dict[str, Any]:
    """Arguments of training under DeepSpeed."""
    small = {"stage": stage, "reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}
    if stage == 3:
        small |= {
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_prefetch_bucket_size": 10_000,
            "stage3_param_persistence_threshold": 0,
        }
    auto = dict.fromkeys(
        ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "train_batch_size"),
        "auto",
    )
    return {"deepspeed": {**auto, "zero_optimization": small, "zero_allow_untested_optimizer": True}}


def method(kind: str, folder: Path) -> Any:
    """A fresh method of a kind: the example of its test file, unless overridden here."""
    old = {"seed": 9, "low": 30, "high": 59}
    made = {
        "replay": lambda: Replay(toy.rows(**old), ratio=0.3, weight=0.7),
        "gere": lambda: GeRe(toy.rows(seed=14), per_batch=1, weight=2.0, num_samples=8, cache_dir=str(folder / "gere")),
        "kif": lambda: KIF(toy.rows(**old), inner_steps=2, outer_steps=1, outer_learning_rate=2e-3),
        "recadam": lambda: RecAdam(k=1.0, t0=3, anchor_strength=100.0, floor=0.2),
        "o_lora": lambda: OLoRA(weight=0.5),
        "migu": lambda: MIGU(share=0.3, mask_a=True, first_task=True),
    }
    return made[kind]() if kind in made else covering.module(kind).example(None)


def adapter() -> LoraConfig:
    """The adapter of LoRA cells."""
    return LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


def base(folder: Path) -> Path:
    """The base model on disk, made once before any process starts."""
    if not (folder / "base").is_dir():
        toy.model(**WIDE).save_pretrained(folder / "base")
        for kind, weights in (
            *((k, w) for k in FURTHER for w in ("full", "LoRA") if w == "LoRA" or not covering.adapters_only([k])),
            ("o_lora", "LoRA"),
        ):
            first = build(folder, "one process", kind, weights, f"first-{kind}-{weights}", start=str(folder / "base"))
            first.train()
            first.save_model()
    return folder / "base"


def build(folder: Path, mode: str, kind: str, weights: str, name: str, start: str | None = None, **changes: Any) -> Any:
    """A trainer of four steps that saves after two."""
    ways = {"one process": {}, "DDP": {}, "FSDP2": FSDP, **{f"ZeRO-{i}": zero(i) for i in (1, 2, 3)}}
    one = mode == "one process"
    settings = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2 if one else 1, "use_cpu": mode in ("one process", "DDP"), **ways[mode], **changes,
    }  # fmt: skip
    earlier = folder / "one process" / f"first-{kind}-{'LoRA' if weights != 'full' else 'full'}"
    model: Any = start or str(earlier if earlier.is_dir() and weights != "4-bit LoRA" else folder / "base")
    if weights == "4-bit LoRA":
        quantised = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_quant_storage=torch.float32,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(model, quantization_config=quantised, dtype=torch.float32)
        for module in model.modules():
            # On processors with bf16 arithmetic an evaluation repacks the weights, and training continues in bf16.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    # A predecessor's adapter is trained further, and built on by O-LoRA.
    further = kind in FURTHER and earlier.is_dir() and weights == "LoRA" and start is None
    return ContinualTrainer(
        model, ContinualConfig(**toy.settings(folder / mode / name, **settings)), train_dataset=toy.rows(),
        processing_class=toy.tokenizer(), peft_config=adapter() if weights != "full" and not further and not covering.own_modules([kind]) else None,
        methods=[method(kind, folder)],
    )  # fmt: skip


def trained(trainer: Any) -> torch.Tensor:
    """All trainable weights, unsharded, in the order of their names."""
    parts = []
    for _, p in sorted(trainer.run.named_parameters().items()):
        if isinstance(p, DTensor):
            parts.append(p.detach().full_tensor())
        elif hasattr(p, "ds_id"):
            with deepspeed.zero.GatheredParameters([p]):
                parts.append(p.detach().clone())
        else:
            parts.append(p.detach())
    return torch.cat([part.float().flatten().cpu() for part in parts])


def outcome(folder: Path, mode: str, cell: str) -> dict[str, Any]:
    """Train a cell, straight and resumed; or the error it is refused with, and whether that was at construction."""
    kind, _, weights = cell.partition(":")
    name, built = cell.replace(":", "-").replace(" ", "-"), False
    try:
        straight = build(folder, mode, kind, weights, name)
        built = True
        straight.train()
        found: dict[str, Any] = {"weights": trained(straight), "states": plain(straight.task_states)}
        found["loss"] = [e["loss"] for e in straight.state.log_history if "loss" in e]
    except (ValueError, TypeError, NotImplementedError, RuntimeError, KeyError, AttributeError) as error:
        return {"error": f"{type(error).__name__}: {error}", "built": built}
    try:
        resumed = build(folder, mode, kind, weights, name)
        resumed.train(resume_from_checkpoint=str(folder / mode / name / "checkpoint-2"))
        found["resumed"] = trained(resumed)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, KeyError, AttributeError) as error:
        found["resume_error"] = f"{type(error).__name__}: {error}"
    return found


def plain(states: Any) -> dict[str, torch.Tensor]:
    """The tensors that methods leave, by name."""
    return {f"{m}/{k}": v for m, s in (states or {}).items() for k, v in s.items() if torch.is_tensor(v)}


if __name__ == "__main__":
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    place, results = Path(sys.argv[2]), {}
    for chosen in sys.argv[3:]:
        results[chosen] = outcome(place, MODE, chosen)
        if int(os.environ.get("RANK", 0)) == 0:
            torch.save(results, place / f"{MODE}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # joins the threads of gloo; an exit while they run may abort
