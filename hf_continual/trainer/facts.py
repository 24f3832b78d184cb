"""The facts of a run for its model card, as its trainer knows them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import LoraConfig, PeftModel

from hf_continual import private
from hf_continual.hub.facts import CardFacts, Evaluation, MethodFacts, TaskFacts
from hf_continual.hub.files import installed_versions
from hf_continual.hub.folder_facts import has_facts, read_facts
from hf_continual.hub.refs import ModelRef, loaded_ref
from hf_continual.inference.kinds import KindConfig
from hf_continual.methods.base import Method
from hf_continual.trainer.rates import peak_and_factor
from hf_continual.trainer.trl_trainer import SFTTrainer, get_comet_experiment_url, get_trackio_space_url

if TYPE_CHECKING:
    from hf_continual.trainer.live import LiveTrainer

# Settings that a reader needs to repeat the training; shown on the card if not the default, or one of the first four.
SETTINGS = (
    "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "adam_beta1", "adam_beta2",
    "adam_epsilon", "bf16", "fp16", "max_length", "packing", "packing_strategy", "padding_free", "completion_only_loss",
    "assistant_only_loss", "loss_type", "label_smoothing_factor", "neftune_noise_alpha", "train_sampling_strategy",
)  # fmt: skip
ALWAYS = SETTINGS[:5]
# Settings that determine the values of a quantised base.
QUANTIZATION = (
    "quant_method", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
    "llm_int8_skip_modules", "bits", "group_size",
)  # fmt: skip


def run_facts(trainer: LiveTrainer, evaluation: Evaluation | None = None, train_rows: int | None = None) -> CardFacts:
    """The facts of a run so far.

    Args:
        trainer: The trainer.
        evaluation: The measured scores, or None.
        train_rows: Number of the task's rows; None for a stream.

    Returns:
        The facts; they contain no paths.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    args = trainer.args
    adapter = isinstance(model, PeftModel)
    path, revision = _loaded_from(model)
    named = getattr(args, "hub_base_model", None)
    start = ModelRef(named, license=None) if named else loaded_ref(path, revision)
    earlier = read_facts(Path(path)) if path and Path(path).is_dir() and has_facts(Path(path)) else None
    this = TaskFacts(getattr(args, "task_name", "task"), train_rows=train_rows, started_from=start)
    tasks: tuple[TaskFacts, ...] = (this,)
    base, parent = start, None
    if earlier is not None and earlier.tasks:
        last = replace(earlier.tasks[-1], checkpoint=earlier.tasks[-1].checkpoint or start)
        tasks = (*earlier.tasks[:-1], last, this)
        if not adapter:
            base, parent = earlier.base, start
    return CardFacts(
        name=Path(args.output_dir).absolute().name,
        repo_id=trainer.hub_model_id,
        kind="adapter" if adapter else "model",
        base=base,
        parent=parent,
        tasks=tasks,
        methods=method_facts(tuple(trainer.methods)),
        evaluation=evaluation or Evaluation(),
        settings=settings_of(args) | _live_settings(trainer),
        adapter=adapter_facts(model) if adapter else {},
        seed=args.seed,
        steps=trainer.state.global_step,
        **cost_of(trainer),
        ended=tuple(
            f"{e['event'].replace('_', ' ')} at step {e['step']}: {e['reason']}" for e in gauge_events(trainer)
        ),
        hardware=hardware(args.world_size),
        tags=trl_tags(model.config),
        tracking=tracking_pages(),
        chat=getattr(trainer.processing_class, "chat_template", None) is not None,
        versions=installed_versions(),
    )


def cost_of(trainer: LiveTrainer) -> dict[str, Any]:
    """Time (s), tokens and peak memory (bytes, CUDA only) of a run, the first two only if this process saw all of it."""
    cuda = torch.cuda.is_available() and trainer.args.device.type == "cuda"
    memory = {"memory_bytes": torch.cuda.max_memory_allocated(trainer.args.device)} if cuda else {}
    step, tokens = trainer.started_at or (-1, 0)
    if step != 0:
        return memory
    seconds = next((e["train_runtime"] for e in reversed(trainer.state.log_history) if "train_runtime" in e), None)
    return {**memory, "seconds": seconds, "tokens": private.tokens_seen(trainer) - tokens}


def gauge_events(trainer: LiveTrainer) -> list[dict[str, Any]]:
    """What rules on gauges have done in a run."""
    return [event for method in trainer.methods if method.watches for event in getattr(method, "events", ())]


def trl_tags(config: Any = None) -> tuple[str, ...]:
    """The tags of TRL's own cards, by which the Hub counts and finds models trained with TRL.

    Args:
        config: The model's configuration, if there is a model.

    Returns:
        The tags that `SFTTrainer.create_model_card` would write now.
    """
    tags = ["generated_from_trainer", *private.tags_of(SFTTrainer)]
    if hasattr(config, "unsloth_version"):
        tags.append("unsloth")
    if "JOB_ID" in os.environ:
        tags.append("hf_jobs")
    if page := get_trackio_space_url():
        tags.append(f"trackio:{page}")
    return tuple(tags)


def tracking_pages() -> dict[str, str]:
    """Pages of the active trackers, by name."""
    run = getattr(sys.modules.get("wandb"), "run", None)
    pages = {
        "Weights & Biases": getattr(run, "url", None),
        "Trackio": get_trackio_space_url(),
        "Comet": get_comet_experiment_url(),
    }
    return {name: page for name, page in pages.items() if page}


def _loaded_from(model: Any) -> tuple[str | None, str | None]:
    """Path or id that the weights below any adapter came from, and the requested revision."""
    if isinstance(model, PeftModel):
        config = model.peft_config[model.active_adapter if isinstance(model.active_adapter, str) else "default"]
        base: Any = model.get_base_model()
        return config.base_model_name_or_path or base.config.name_or_path, config.revision
    return model.config.name_or_path or None, None


def method_facts(methods: Sequence[Method]) -> tuple[MethodFacts, ...]:
    """Describe methods for a card."""
    return tuple(MethodFacts(m.name, m.describe(), m.paper) for m in methods if not m.watches)


def settings_of(args: Any) -> dict[str, Any]:
    """Training arguments that differ from the defaults, and those needed to repeat a run."""
    defaults = {f.name: f.default for f in fields(args)}
    found = {}
    for name in SETTINGS:
        value = getattr(args, name, None)
        value = getattr(value, "value", value)
        default = getattr(defaults.get(name), "value", defaults.get(name))
        if value is not None and (value != default or name in ALWAYS) and not (name == "max_steps" and value == -1):
            found[name] = value
    if "max_steps" in found:
        found.pop("num_train_epochs", None)
    return found


def _live_settings(trainer: LiveTrainer) -> dict[str, Any]:
    """Settings in use that differ from the arguments: a given optimizer's rate, the batch size that fitted."""
    found: dict[str, Any] = {}
    if (optimizer := trainer.optimizer) is not None:
        peak, _ = peak_and_factor(getattr(optimizer, "optimizer", optimizer), trainer.lr_scheduler)
        found["learning_rate"] = peak or trainer.args.learning_rate
    batch = private.fitted_batch(trainer) // max(trainer.args.n_gpu, 1)
    if trainer.args.auto_find_batch_size and batch:
        found["per_device_train_batch_size"] = batch
    return found


def adapter_facts(model: Any) -> dict[str, Any]:
    """Describe the adapter."""
    config = next(iter(model.peft_config.values()))
    if isinstance(config, KindConfig):
        return {"kind": str(config.peft_type), **config.sizes}
    if isinstance(config, LoraConfig):
        modules = config.target_modules
        found: dict[str, Any] = {
            "r": config.r,
            "alpha": config.lora_alpha,
            "dropout": config.lora_dropout,
            "modules": sorted(modules) if isinstance(modules, set | list | tuple) else modules,
        }
    else:
        kind = str(getattr(config.peft_type, "value", config.peft_type)).lower().replace("_", " ")
        found = {"peft": kind, "virtual_tokens": getattr(config, "num_virtual_tokens", None)}
        found = {key: value for key, value in found.items() if value is not None}
    # Merging needs the base as the adapter saw it.
    quantization = getattr(model.get_base_model().config, "quantization_config", None)
    if quantization is not None:
        data = quantization if isinstance(quantization, dict) else quantization.to_dict()
        found["quantization"] = {k: v for k in QUANTIZATION if (v := data.get(k)) not in (None, False)}
        if dtype := _quantised_from(model.get_base_model()):
            found["quantization"]["dtype"] = dtype
    return found


def _quantised_from(model: Any) -> str | None:
    """The dtype of the weights before quantisation. The model's own dtype may have been raised to float32 since."""
    states = (getattr(p, "quant_state", None) for p in model.parameters())
    dtype = next((s.dtype for s in states if s is not None), getattr(model.config, "dtype", None))
    return None if dtype is None else str(dtype).removeprefix("torch.")


def hardware(processes: int) -> str:
    """The hardware of the run."""
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return f"{processes} x {name}" if processes > 1 else name
