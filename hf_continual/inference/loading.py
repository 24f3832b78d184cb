"""Load a trained model whose inference is not plain: a folder of one of the `kinds`, onto its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

from hf_continual.inference.kinds import KINDS
from hf_continual.inference.names import MOE_LORA, PROMPT_POOL, SAPT_LORA, kind_in
from hf_continual.paths import check_is_there


def load_kind(folder: str | Path, model: Any = None, kind: str | None = None, trainable: bool = False) -> PeftModel:
    """Put the modules of a folder onto their base model.

    Args:
        folder: Folder, or Hub id.
        model: The base model; None loads the one that the folder names.
        kind: One of `KINDS` that it must be; None takes any.
        trainable: Whether it will be trained further.

    Returns:
        A `PeftModel` whose forward pass and `generate()` are used as those of transformers.

    Raises:
        ValueError: If the folder holds something else, or the base has different weights.
    """
    check_is_there(str(folder), "the model")
    path = Path(folder) if Path(folder).is_dir() else Path(snapshot_download(str(folder)))
    found = kind_in(path)
    if found is None or (kind is not None and found != kind):
        raise ValueError(
            f"{folder} does not hold {kind or 'any of ' + ', '.join(KINDS)} (its adapter_config.json says {found!r}). Load a whole "
            f"model with AutoModelForCausalLM, an adapter with AutoPeftModelForCausalLM."
        )
    config = PeftConfig.from_pretrained(str(path))
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, revision=config.revision)
    config.base_model_name_or_path = getattr(model, "name_or_path", None) or config.base_model_name_or_path
    return PeftModel.from_pretrained(model, path, config=config, is_trainable=trainable)


def load_prompt_pool(folder: str | Path, model: Any = None) -> PeftModel:
    """Load what `L2P` trained: a prompt pool on its base model, ready for inference.

    Example:
        >>> model = load_prompt_pool("out/task-01")
        >>> model.generate(**tokenizer(["Law: ", "Tax: "], return_tensors="pt", padding=True, padding_side="left"))

    Args:
        folder: Folder, or Hub id.
        model: The base model; None loads the one that the folder names.

    Returns:
        A `PeftModel`; each row chooses its prompts by its own tokens. `generate()` takes batches padded on the left, beams
        and sampling, as of any model.

    Raises:
        ValueError: If the folder holds something else, or the base has different weights.
    """
    return load_kind(folder, model, PROMPT_POOL)


def load_moe_lora(folder: str | Path, model: Any = None, task: str | None = None) -> PeftModel:
    """Load what `MoELoRA` trained: LoRA experts with their gates on a base model, ready for inference.

    Example:
        >>> model = load_moe_lora("out/task-01", task="law")
        >>> model.generate(**tokenizer("Law: ", return_tensors="pt"))
        >>> model.use_task(["law", "tax"])  # one for each row of the batches that follow

    Args:
        folder: Folder, or Hub id.
        model: The base model; None loads the one that the folder names.
        task: What a gate by task is set to; None: the task learned last.

    Returns:
        A `PeftModel` with `use_task` and `tasks`, the names that the gate knows.

    Raises:
        ValueError: If the folder holds something else, the base has other weights, or the task was not learned.
    """
    loaded = load_kind(folder, model, MOE_LORA)
    if task is not None:
        loaded.use_task(task)
    return loaded


def load_sapt_lora(folder: str | Path, model: Any = None) -> PeftModel:
    """Load what `SAPTLoRA` trained: a LoRA pair per task with the attention that mixes them, ready for inference.

    Example:
        >>> model = load_sapt_lora("out/task-01")
        >>> model.generate(**tokenizer(["Law: ", "Tax: "], return_tensors="pt", padding=True, padding_side="left"))

    Args:
        folder: Folder, or Hub id.
        model: The base model; None loads the one that the folder names.

    Returns:
        A `PeftModel`; the pairs are mixed for each row by its question, in the first pass, and stay so while it generates.

    Raises:
        ValueError: If the folder holds something else, or the base has other weights.
    """
    return load_kind(folder, model, SAPT_LORA)
