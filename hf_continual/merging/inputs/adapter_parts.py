"""An adapter's tensors sorted by module, and its configuration compared with them; no base is needed for that."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from hf_continual.merging.errors import MergeError
from hf_continual.merging.inputs.checkpoint import ADAPTER_CONFIG, Checkpoint
from hf_continual.merging.inputs.safetensors_file import StoredTensor
from hf_continual.tensors.concatenate import rank_of

PREFIX = "base_model.model."
_PART = re.compile(
    r"^(?P<module>.*)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?P<rest>\.weight|\.bias)?$"
)
_AGAIN = "Save it again."


@dataclass(frozen=True)
class Parts:
    """The contents of an adapter's file.

    Args:
        factors: Module -> its parts: ``lora_A``, ``lora_B``, ``lora_B.bias``, ``lora_magnitude_vector``.
        others: Name, without PEFT's prefix -> a tensor that is not part of a product.
    """

    factors: Mapping[str, Mapping[str, StoredTensor]]
    others: Mapping[str, StoredTensor]


def split(adapter: Checkpoint) -> Parts:
    """Sort an adapter's tensors.

    Args:
        adapter: The adapter, its options checked.

    Returns:
        Its parts.

    Raises:
        MergeError: If a product lacks a part, or the configuration states another rank or other parts.
    """
    factors: dict[str, dict[str, StoredTensor]] = {}
    others: dict[str, StoredTensor] = {}
    for key, tensor in adapter.tensors.items():
        name = key.removeprefix(PREFIX)
        if found := _PART.match(name):
            kind = found["part"].replace("embedding_", "")
            kind += ".bias" if found["rest"] == ".bias" else ""
            factors.setdefault(found["module"], {})[kind] = tensor
        else:
            others[name] = tensor
    if not adapter.tensors:
        raise MergeError(
            f"{adapter.name} holds no tensors at all: nothing was learned, or its file was cut off. {_AGAIN}"
        )
    for module, own in factors.items():
        _check_product(adapter, module, own)
    return Parts(factors, others)


def _check_product(adapter: Checkpoint, module: str, own: Mapping[str, StoredTensor]) -> None:
    if "lora_A" not in own or "lora_B" not in own:
        raise MergeError(f"{adapter.name} has only {', '.join(own)} of {module!r}: it is incomplete. {_AGAIN}")
    if strange := next((t for t in own.values() if not t.is_float), None):
        raise MergeError(
            f"{adapter.name} stores {strange.name!r} as {strange.dtype}, but factors must be floating-point. {_AGAIN}"
        )
    a, b, rank = own["lora_A"], own["lora_B"], rank_of(adapter.config, module)
    if a.shape[:1] != (rank,) or b.shape[1:2] != (rank,):
        raise MergeError(
            f"{adapter.name}: {ADAPTER_CONFIG} gives {module!r} the rank {rank}, which sets its scale, but its factors "
            f"are A {list(a.shape)} and B {list(b.shape)}. One of the two files belongs to another adapter; restore the right one."
        )
    for option, part in (("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")):
        if (part in own) != bool(adapter.config.get(option)):
            there = "no" if part not in own else "a"
            raise MergeError(
                f"{adapter.name}: {ADAPTER_CONFIG} says {option}={adapter.config.get(option)!r}, but its file "
                f"has {there} {part} for {module!r}. One of the two files belongs to another adapter; restore the right one."
            )
