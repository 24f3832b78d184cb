"""Load the base model, or the model in a task's folder, for training or for scoring."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from hf_continual.hub.damaged import loading
from hf_continual.inference.names import kind_in
from hf_continual.stream.plan import ModelPlan, Plan
from hf_continual.trainer.adapters import EARLIER, adapter_on, is_adapter, stacked

if TYPE_CHECKING:
    from hf_continual.methods.base import Method

__all__ = [
    "adapter_to_add",
    "is_adapter",
    "load_adapter",
    "load_base",
    "load_finished",
    "load_for_training",
    "load_tokenizer",
    "local_adapter",
    "new_adapter",
]


def local_adapter(source: str, revision: str | None = None) -> Path:
    """The local folder of an adapter; one on the Hub is downloaded."""
    path = Path(source).expanduser()
    return path if path.is_dir() else Path(snapshot_download(source, revision=revision))


def load_tokenizer(model: ModelPlan) -> Any:
    """The tokenizer of a plan's model; the end token pads if it has no padding token."""
    source = model.tokenizer or model.path
    with loading(source, "the tokenizer"):
        tokenizer: Any = AutoTokenizer.from_pretrained(source, revision=model.revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(model: ModelPlan, folder: str | Path | None = None) -> Any:
    """Load a causal language model as the plan describes it.

    Args:
        model: The model to load, and how.
        folder: A task's folder with full weights, instead of the plan's model.

    Returns:
        The model, on the host unless it is quantised.
    """
    options: dict[str, Any] = {"dtype": model.dtype if model.dtype == "auto" else getattr(torch, model.dtype)}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    if model.quantization is not None:
        options["quantization_config"] = BitsAndBytesConfig(**model.quantization)
        if torch.cuda.is_available():
            options["device_map"] = {"": PartialState().local_process_index}
    if folder is None:
        options["revision"] = model.revision
        with loading(model.path, "the base model"):
            return AutoModelForCausalLM.from_pretrained(model.path, **options)
    with loading(folder, "the model of a task", _again(Path(folder))):
        return AutoModelForCausalLM.from_pretrained(folder, **options)


def load_adapter(base: Any, folder: Path, **options: Any) -> PeftModel:
    """Load a task's adapter onto its base model.

    Args:
        base: The base model.
        folder: The task's folder.
        **options: As `PeftModel.from_pretrained` takes them.

    Returns:
        The model with the adapter.
    """
    with loading(folder, "the adapter of a task", _again(folder)):
        return adapter_on(base, folder, **options)


def _again(folder: Path) -> str:
    return f"Delete {folder} and the folders of the tasks that were trained on top of it: the same command trains them again."


def load_finished(plan: Plan, folder: Path | None) -> Any:
    """Load the model of a folder, or the base model, for scoring on this process's device."""
    if folder is None:
        model = load_base(plan.model)
        if plan.model.adapter is not None:
            model = adapter_on(model, local_adapter(plan.model.adapter))
    elif is_adapter(folder):
        model = load_adapter(load_base(plan.model), folder)
    else:
        model = load_base(plan.model, folder)
    model = model.eval()
    return model if plan.model.quantization else model.to(PartialState().device)


def new_adapter(plan: Plan) -> LoraConfig | None:
    """The adapter that a plan's tasks add, None if they train full weights or an existing adapter."""
    options: dict[str, Any] = {"task_type": "CAUSAL_LM", **(plan.peft or {})}
    return None if plan.peft is None else LoraConfig(**options)


def adapter_to_add(plan: Plan, methods: Iterable[Method]) -> Any:
    """What a task's training puts onto its model: modules that one of its methods brings, or the plan's new adapter."""
    brought = next((config for method in methods if (config := method.adapter()) is not None), None)
    return new_adapter(plan) if brought is None else brought


def load_for_training(plan: Plan, parent: Path | None) -> tuple[Any, LoraConfig | None]:
    """Load the model that a task continues from.

    Args:
        plan: The plan.
        parent: Folder of the previous task, None for the base model.

    Returns:
        The model, and the adapter that the trainer still has to add.

    Raises:
        ValueError: If the parent's folder and the plan do not agree on adapters.
    """
    config = new_adapter(plan)
    if parent is None and plan.model.adapter is None:
        return load_base(plan.model), config
    if parent is None:
        folder, base = local_adapter(str(plan.model.adapter)), load_base(plan.model)
        if config is None:
            return adapter_on(base, folder, is_trainable=True), None
        return stacked(adapter_on(base, folder, adapter_name=EARLIER), folder, config), None
    if not is_adapter(parent):
        # A merge may turn adapters into a full model; a new adapter goes on top of it.
        return load_base(plan.model, parent), config
    if config is None and plan.model.adapter is None and kind_in(parent) is None:
        raise ValueError(
            f"{parent} holds an adapter, but the plan has no `peft`: nothing would be trained. Give it `peft`."
        )
    base = load_base(plan.model)
    if config is None or plan.between_tasks != "new_adapter":
        return load_adapter(base, parent, is_trainable=True), None
    return stacked(load_adapter(base, parent, adapter_name=EARLIER), parent, config), None
