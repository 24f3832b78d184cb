"""Read a PEFT LoRA adapter: what it adds to which weight of its base, and which tensors it replaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_continual.merging.errors import MergeError, some
from hf_continual.merging.inputs.adapter_options import check_options
from hf_continual.merging.inputs.adapter_parts import PREFIX, Parts, split
from hf_continual.merging.inputs.adapter_saved import base_shape, check_announced, find, saved_tensors
from hf_continual.merging.inputs.architecture import Architecture, read_architecture
from hf_continual.merging.inputs.checkpoint import ADAPTER_CONFIG, Checkpoint
from hf_continual.merging.inputs.safetensors_file import Files, StoredTensor
from hf_continual.tensors.concatenate import scaling


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one weight: ``scale * B A``, transposed where the weight is stored so.

    Args:
        a: Factor A, ``(rank, in)``; of an embedding ``(rank, vocabulary)``.
        b: Factor B, ``(out, rank)``.
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA, with the module's own rank and alpha.
        transposed: Whether the weight is ``(in, out)``: an embedding, or GPT-2's Conv1D.
        magnitude: DoRA's norm of each output, or None.
    """

    a: StoredTensor
    b: StoredTensor
    scale: float
    transposed: bool
    magnitude: StoredTensor | None = None

    @property
    def rank(self) -> int:
        """Columns of B."""
        return self.b.shape[1]

    def load(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """The product's factors in the weight's orientation: left ``(rows, rank)`` scaled, right ``(rank, columns)``."""
        with Files() as files:
            a, b = files.load(self.a).to(dtype), files.load(self.b).to(dtype)
        return (a.T.contiguous() * self.scale, b.T.contiguous()) if self.transposed else (b * self.scale, a)


@dataclass(frozen=True)
class Adapter:
    """An adapter's parts by the names of its base's tensors.

    Args:
        checkpoint: Where it is stored.
        factors: Name of a weight -> what is added to it.
        added: Name of a bias -> a vector that is added to it, and its scale (`lora_bias`).
        saved: Name of a tensor -> what replaces it (`modules_to_save`, trained biases, a resized embedding).
    """

    checkpoint: Checkpoint
    factors: Mapping[str, Factors]
    added: Mapping[str, tuple[StoredTensor, float]]
    saved: Mapping[str, StoredTensor]

    @property
    def is_plain(self) -> bool:
        """Whether it is a sum of low-rank products and full tensors, which add up in the form of an adapter."""
        return not self.added and all(f.magnitude is None for f in self.factors.values())


def read_adapters(adapters: Sequence[Checkpoint], base: Checkpoint) -> list[Adapter]:
    """Read adapters, and match them with the model that they are applied to.

    Args:
        adapters: The adapters.
        base: The full model.

    Returns:
        Their parts, in the same order.

    Raises:
        MergeError: If one is not a LoRA adapter, is more than low-rank products, is incomplete, or does not fit the base.
    """
    notes = [check_options(adapter) for adapter in adapters]
    parts = [split(adapter) for adapter in adapters]
    if not adapters:
        return []
    known = read_architecture(base, [(a, p.factors) for a, p in zip(adapters, parts, strict=True)])
    told = known.adapters or ({},) * len(adapters)
    return [
        _matched(replace(a, notes=(*a.notes, *n)), p, base, known, t)
        for a, p, n, t in zip(adapters, parts, notes, told, strict=True)
    ]


def _matched(
    checkpoint: Checkpoint, parts: Parts, base: Checkpoint, known: Architecture, told: Mapping[str, Any]
) -> Adapter:
    check_announced(checkpoint, parts.others, base)
    saved = saved_tensors(parts, base, checkpoint, known.names)
    factors: dict[str, Factors] = {}
    added = {}
    for module, own in parts.factors.items():
        target = find(f"{module}.weight", base, checkpoint, known.names)
        scale = scaling(checkpoint.config, PREFIX + module)
        shape = saved[target].shape if target in saved else base_shape(base, target)
        # A head that is not stored is the embedding, which has the orientation of a linear layer's weight.
        transposed = known.transposed.get(module) if target in base.tensors else False
        factors[target] = _fitting(checkpoint, target, shape, own, scale, transposed)
        if "lora_B.bias" in own:
            added[find(f"{module}.bias", base, checkpoint, known.names)] = (own["lora_B.bias"], scale)
    notes = _check_complete(checkpoint, base, told)
    return Adapter(replace(checkpoint, notes=(*checkpoint.notes, *notes)), factors, added, saved)


def _check_complete(adapter: Checkpoint, base: Checkpoint, told: Mapping[str, Any]) -> list[str]:
    """Compare an adapter's file with what PEFT loads from its configuration; notes on what could not be compared."""
    if refused := told.get("refused"):
        raise MergeError(
            f"PEFT cannot apply {adapter.name} to {base.name} ({refused[:300]}). Restore {ADAPTER_CONFIG} as it was saved, or "
            f"give the base that it was trained on ({adapter.config.get('base_model_name_or_path')!r})."
        )
    if missing := told.get("missing"):
        raise MergeError(
            f"{adapter.name} is incomplete: by its {ADAPTER_CONFIG} it adapts modules of {base.name} for which its file has no "
            f"factors, {len(missing)} tensors in all ({some(missing)}). Save it again; if they were removed on purpose, list "
            f"the modules under exclude_modules there."
        )
    if extra := told.get("unexpected"):
        raise MergeError(
            f"{adapter.name} has {len(extra)} factors that PEFT would ignore ({some(extra)}): {ADAPTER_CONFIG} does not "
            f"adapt these modules (target_modules={adapter.config.get('target_modules')!r}). Restore that file as it was saved."
        )
    if unknown := told.get("unknown"):
        return [f"Whether {adapter.name} is complete was not checked: {unknown}."]
    return []


def _fitting(
    checkpoint: Checkpoint,
    name: str,
    shape: tuple[int, ...] | None,
    own: Mapping[str, StoredTensor],
    scale: float,
    transposed: bool | None,
) -> Factors:
    """The product of a weight; `transposed` says how the weight is stored, None: the architecture is not known."""
    a, b = own["lora_A"], own["lora_B"]
    out_in = (b.shape[0], a.shape[1]) if len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] else None
    if transposed is None and out_in is not None:
        # The shape of a square weight does not tell; the configuration does.
        straight = shape in (None, out_in)
        embedding = "lora_embedding" in a.name
        transposed = (
            embedding or not straight or (shape == out_in[::-1] and bool(checkpoint.config.get("fan_in_fan_out")))
        )
    if out_in is None or shape not in (None, out_in[::-1] if transposed else out_in):
        raise MergeError(
            f"{checkpoint.name}: factors A {list(a.shape)} and B {list(b.shape)} do not fit {name!r}, which is "
            f"{list(shape or ())} in the base{' and stored transposed' if transposed else ''}. Give the base that it was "
            f"trained on ({checkpoint.config.get('base_model_name_or_path')!r}); convolutions cannot be merged."
        )
    return Factors(a, b, scale, bool(transposed), own.get("lora_magnitude_vector"))
