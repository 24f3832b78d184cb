"""Kinds of trained modules that change inference: the result of such a method is more than weights of a known architecture.

Its folder is that of a PEFT adapter, ``adapter_config.json`` (kind, configuration, base model and a hash that tells the base
from another) and ``adapter_model.safetensors`` (only what was trained). A kind is registered with PEFT when this module is
imported, so `PeftModel` saves, resumes, loads and generates it, and everything that knows adapters knows it.

To add a kind, name it in `names.py` (title, method, loader, sizes), write two classes in a module of this package, and
list them in `_KINDS` below:

1. A configuration, a dataclass below `KindConfig` (and below `LoraConfig` where the layers are LoRA's) that sets
   `peft_type` to the kind's name and answers `tokens_in_front` where it is not 0.
2. A tuner below `KindTuner` and one of PEFT's (`BaseTuner`, `LoraModel`): `prefix`, and `inject_adapter`, which puts the
   modules onto the model and calls `check_base`. What acts at inference hangs on the modules themselves as hooks, since
   `generate()` and `evaluation/` call the parts of a model and not the tuner. `asked` says which tokens may choose
   (never the answer), `keep_rows` which rows of a batch continue, `for_task` which task is scored; see `KindTuner`.

The method that trains it returns the configuration from `Method.adapter`; a public loader is a line of `loading.py`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor

from hf_continual.inference.base import KindConfig, KindTuner
from hf_continual.inference.moe_lora import MoELoraConfig, MoELoraTuner
from hf_continual.inference.names import MOE_LORA, PROMPT_POOL, SAPT_LORA
from hf_continual.inference.prompt_pool import PromptPoolConfig, PromptPoolTuner
from hf_continual.inference.sapt_lora import SaptLoraConfig, SaptLoraTuner

_KINDS: dict[str, tuple[type[KindConfig], type[KindTuner]]] = {
    PROMPT_POOL: (PromptPoolConfig, PromptPoolTuner),
    MOE_LORA: (MoELoraConfig, MoELoraTuner),
    SAPT_LORA: (SaptLoraConfig, SaptLoraTuner),
}

for _name, (_config, _tuner) in _KINDS.items():
    # `peft.utils.register_peft_method` takes only the names of PEFT's own enumeration; its tables take any.
    PEFT_TYPE_TO_CONFIG_MAPPING[_name] = _config  # pyrefly: ignore[unsupported-operation]
    PEFT_TYPE_TO_TUNER_MAPPING[_name] = _tuner  # pyrefly: ignore[unsupported-operation]
    PEFT_TYPE_TO_PREFIX_MAPPING[_name] = _tuner.prefix  # pyrefly: ignore[unsupported-operation]

KINDS = tuple(_KINDS)


def kind_of(model: Any) -> str | None:
    """The kind whose modules are on a model; None for a plain model and one with a plain adapter."""
    return None if (tuner := tuner_of(model)) is None else str(tuner.active_config.peft_type)


def tuner_of(model: Any) -> KindTuner | None:
    """The tuner of such modules, without wrappers such as DDP's; None if the model has none."""
    found = model.base_model if isinstance(model, PeftModel) else None
    return found if isinstance(found, KindTuner) else None


def asked(model: Any, mask_BS: Tensor) -> AbstractContextManager[Any]:
    """Mark the tokens of the question, for forward passes that also get the answer.

    Args:
        model: A causal language model of any kind.
        mask_BS: True for tokens of the question.

    Returns:
        A context; it does nothing for a model whose inference is plain.
    """
    tuner = tuner_of(model)
    return nullcontext() if tuner is None else tuner.asked(mask_BS)


def for_task(model: Any, name: str) -> AbstractContextManager[Any]:
    """Say which task is scored, to a model that must be told.

    Args:
        model: A causal language model of whatever kind.
        name: Name of the task, which may be one that was not learned.

    Returns:
        A context; it does nothing for a model that needs no task.
    """
    tuner = tuner_of(model)
    return nullcontext() if tuner is None else tuner.for_task(name)


def keep_rows(model: Any, index_N: Tensor) -> None:
    """Keep some rows of a batch, after their cache was reduced to them.

    Args:
        model: A causal language model of any kind.
        index_N: Indices of the rows, in the previous batch; an index may occur several times.
    """
    if (tuner := tuner_of(model)) is not None:
        tuner.keep_rows(index_N)
