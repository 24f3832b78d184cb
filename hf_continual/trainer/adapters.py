"""Start training from an adapter: continue it, or stack a new one on top."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import LoraConfig, PeftConfig, PeftModel

import hf_continual.inference.kinds  # noqa: F401 - makes its kinds known to PEFT
from hf_continual.tensors.concatenate import concatenate_adapters

ADAPTER = "adapter_config.json"
EARLIER = "earlier"
PARTS, STACKED = ".parts", ".stacked"
CONTINUE, STACK, MERGE = FROM_ADAPTER = ("continue", "stack", "merge_then_new")
MERGED = "merged-base"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter rather than a full model."""
    return (folder / ADAPTER).is_file()


def adapter_on(base: Any, folder: Path, **options: Any) -> PeftModel:
    """Load the adapter in a folder onto a base model.

    Args:
        base: The base model, wherever it was loaded from.
        folder: Folder of the adapter.
        **options: As `PeftModel.from_pretrained` takes them.

    Returns:
        The model with the adapter.
    """
    config = PeftConfig.from_pretrained(str(folder))
    # The recorded path of the base may be out of date, and PEFT reads it.
    config.base_model_name_or_path = base.name_or_path
    return PeftModel.from_pretrained(base, folder, config=config, **options)


def stacked(model: PeftModel, folder: Path, config: PeftConfig) -> PeftModel:
    """Add a new, trained adapter on top of an earlier, frozen one.

    Args:
        model: A model whose adapter is called `EARLIER`.
        folder: Folder of the earlier adapter.
        config: The new adapter.

    Returns:
        The model.

    Raises:
        ValueError: If the new adapter is not LoRA: only LoRA can be saved as one adapter with the earlier one.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"a {type(config).__name__} cannot be put on top of the adapter in {folder}: only LoRA adapters can be saved as "
            f"one. Give peft_config=LoraConfig(...), or merge the adapter into its base first (merge_and_unload)."
        )
    model.add_adapter("default", config)
    activate_both(model)
    return model


def choose_way(asked: str | None, adapter: str, new: Any) -> str:
    """Choose what to do with an adapter that training starts from.

    Args:
        asked: The configured way, or None.
        adapter: Its folder or Hub id.
        new: The new adapter's configuration, or None.

    Returns:
        One of `FROM_ADAPTER`.

    Raises:
        ValueError: If the choice needs a new adapter and there is none, or has no use for the one given.
    """
    way = asked or (CONTINUE if new is None else STACK)
    if way == CONTINUE and new is not None:
        raise ValueError(
            f"from_adapter: continue trains the adapter in {adapter} further, but the options of a new adapter were given too "
            f"(peft). Drop them, or say from_adapter: stack or merge_then_new."
        )
    if way != CONTINUE and new is None:
        raise ValueError(
            f"from_adapter: {way} trains a new adapter after the one in {adapter}, but no options of a new one were given. Give them "
            f"(peft_config=LoraConfig(r=16, target_modules='all-linear'); in a plan peft: {{r: 16, target_modules: all-linear}}), or "
            f"say from_adapter: continue."
        )
    return way


def consequence(way: str, adapter: str, config: PeftConfig, new: Any, merged: str = MERGED) -> str:
    """Describe to the user what a way of starting from an adapter means.

    Args:
        way: One of `FROM_ADAPTER`.
        adapter: Folder or Hub id of the adapter.
        config: Its configuration.
        new: The new adapter's configuration, or None.
        merged: Folder of the merged base.

    Returns:
        The sentence.
    """
    rank, base = getattr(config, "r", None), config.base_model_name_or_path
    named = f"adapter {adapter}" + (f" (r={rank})" if rank else "")
    if way == CONTINUE:
        return f"continuing {named} on {base}, 0 new: its weights are trained further, and the output replaces it."
    other = f"1 new adapter (r={getattr(new, 'r', '?')})"
    if way == STACK:
        total = f" of rank {rank + new.r}" if rank and getattr(new, "r", None) else ""
        return f"stacking on {named}: it stays frozen, {other} is trained on top, and both are saved as one adapter{total} on {base}."
    return f"merging {named} into {base}, saved as {merged}: {other} is trained on that and works only together with {merged}."


def merge_into_base(base: Any, folder: Path, target: Path, tokenizer: Any = None) -> Any:
    """Merge an adapter into its base and keep the result, as the base of a new adapter.

    Args:
        base: The base model, not quantised.
        folder: Folder of the adapter.
        target: Folder of the merged model; complete or absent.
        tokenizer: Saved with it, if given.

    Returns:
        The merged model; its ``name_or_path`` is the target.

    Raises:
        ValueError: If the base is quantised.
    """
    if getattr(base.config, "quantization_config", None) is not None:
        raise ValueError(
            f"from_adapter: {MERGE} would round the adapter in {folder} to the 4 or 8 bits of its base. Say stack or continue, which "
            f"leave the base alone, or load the base without quantisation."
        )
    merged: Any = adapter_on(base, folder).merge_and_unload()
    merged.config.name_or_path = merged.name_or_path = str(target)
    if PartialState().is_main_process:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        merged.save_pretrained(unfinished)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
    return merged


def activate_both(model: Any) -> None:
    """Activate both adapters in the forward pass; only the new one is trained."""
    model.base_model.set_adapter(["default", EARLIER])
    for name, parameter in model.named_parameters():
        if f".{EARLIER}." in name:
            parameter.requires_grad_(False)


@contextmanager
def kept_active(model: Any) -> Iterator[None]:
    """Keep everything except the values unchanged while a checkpoint is loaded.

    transformers 5.23 leaves one adapter active, all of it trainable, and in float32 where a 4-bit base had made it
    bfloat16.
    """
    before = {name: (p.requires_grad, p.dtype) for name, p in model.named_parameters()}
    yield
    if is_stacked(model):
        activate_both(model)
    for name, parameter in model.named_parameters():
        trained, dtype = before[name]
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(trained)


def is_stacked(model: Any) -> bool:
    """Whether a model has an earlier adapter under the one being trained."""
    return isinstance(model, PeftModel) and {EARLIER, "default"} <= set(model.peft_config)


def put_in_place(folder: Path) -> None:
    """Move what was saved in ``folder/.parts`` into the folder, whole files, what makes it a model last.

    Args:
        folder: The model's folder.
    """
    parts = folder / PARTS
    for file in sorted((f for f in parts.iterdir() if f.is_file()), key=lambda f: (f.name == ADAPTER, f.name)):
        os.replace(file, folder / file.name)
    shutil.rmtree(parts)


def join(folder: Path) -> None:
    """Join the two adapters saved in ``folder/.parts`` exactly into one, in the folder.

    Args:
        folder: The model's folder.
    """
    parts, joined = folder / PARTS, folder / STACKED
    shutil.rmtree(joined, ignore_errors=True)
    concatenate_adapters(parts / EARLIER, parts, joined)
    for file in parts.iterdir():
        if file.is_file() and not (joined / file.name).exists():
            os.replace(file, folder / file.name)
    # The weights first: with the earlier configuration they fail to load; earlier weights with the new one would load
    # silently.
    for name in ("adapter_model.safetensors", ADAPTER):
        os.replace(joined / name, folder / name)
    shutil.rmtree(joined)
    shutil.rmtree(parts)
