"""Several adapters as one adapter: the plan of its tensors and its configuration."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_continual.merging.engine.chunks import OutputTensor
from hf_continual.merging.engine.combine import combined
from hf_continual.merging.engine.lora import concatenated, truncated
from hf_continual.merging.engine.rules import Rule, weights_of
from hf_continual.merging.errors import MergeError
from hf_continual.merging.inputs.adapter import Adapter, Factors
from hf_continual.merging.inputs.checkpoint import Checkpoint
from hf_continual.merging.inputs.members import Member
from hf_continual.merging.inputs.safetensors_file import DTYPES, Files, StoredTensor

_PREFIX = "base_model.model."


def check_adapter_output(members: Sequence[Member], base: Checkpoint | None, linear: bool) -> str | None:
    """Reason why the merge cannot be an adapter, or None if it can.

    Args:
        members: The models, in any order.
        base: The full model that the adapters sit on. It adds nothing, so it may be one of the models.
        linear: Whether every rule is a weighted sum.

    Returns:
        The reason, or None.
    """
    if not linear:
        return "this method does not add changes up, so its result is not low-rank"
    if not any(m.adapter is not None for m in members):
        return "none of the models is an adapter"
    for member in members:
        if member.adapter is None and not _is_base(member, base):
            return f"{member.name} is a full model"
        if member.adapter is not None and not member.adapter.is_plain:
            return f"{member.name} has DoRA magnitudes or lora_bias, which do not add up as an adapter"
    return None


def _is_base(member: Member, base: Checkpoint | None) -> bool:
    return base is not None and member.checkpoint.folder.resolve() == base.folder.resolve()


class Product:
    """The weighted sum of one module's products, computed when its first factor is written and freed after its second.

    Args:
        parts: Weight and factors of each adapter that has the module.
        rank: Rank to truncate to, or None for the exact sum.
        note: Called with the relative error of a truncation.
    """

    def __init__(self, parts: Sequence[tuple[float, Factors]], rank: int | None, note: Callable[[float], None]) -> None:
        self._parts, self._rank, self._note = parts, rank, note
        self._made: tuple[Tensor, Tensor] | None = None
        total = sum(f.rank for _, f in parts)
        first = parts[0][1]
        # An exact product whose rank is below the requested one is kept unchanged.
        self.rank = total if rank is None else min(rank, total, first.a.shape[1], first.b.shape[0])

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The stored factors that it is made from."""
        return tuple(t for _, f in self._parts for t in (f.a, f.b))

    @property
    def scratch(self) -> int:
        """Bytes needed to compute it: the concatenated factors in float32; for a truncation, their QR in float64."""
        numbers = sum(t.numel for t in self.stored)
        return numbers * (4 * 3 if self.rank == sum(f.rank for _, f in self._parts) else 8 * 3 + 4 * 2)

    def a(self) -> Tensor:
        """Factor A."""
        self._made = self._make()
        return self._made[0]

    def b(self) -> Tensor:
        """Factor B."""
        made = self._made or self._make()
        self._made = None
        return made[1]

    def _make(self) -> tuple[Tensor, Tensor]:
        with Files() as files:
            a = [files.load(f.a).float() for _, f in self._parts]
            b = [files.load(f.b).float() for _, f in self._parts]
        if self._rank is None or self.rank == sum(f.rank for _, f in self._parts):
            return concatenated([w * f.scale for w, f in self._parts], a, b)
        a_RI, b_OR, error = truncated(*concatenated([w * f.scale for w, f in self._parts], a, b), self.rank)
        self._note(error)
        return a_RI, b_OR


def adapter_tensors(
    members: Sequence[Member],
    rule_for: Callable[[str], Rule],
    rank: int | None,
    dtype: str | None,
    errors: dict[str, float],
) -> tuple[list[OutputTensor], dict[str, int]]:
    """The tensors of the merged adapter.

    Args:
        members: The models of the rule, adapters and perhaps their base.
        rule_for: Name of a weight -> the average's weights.
        rank: Rank to truncate to, or None.
        dtype: dtype of the output, or None for the most precise dtype of the inputs.
        errors: Filled while writing with the relative error of each truncated module.

    Returns:
        The tensors, and the rank of each module.
    """
    adapted = [(i, m.adapter) for i, m in enumerate(members) if m.adapter is not None]
    outputs, ranks = _products(adapted, rule_for, rank, dtype, errors)
    for target in sorted({t for _, adapter in adapted for t in adapter.saved}):
        views = [m.view(target) for m in members]
        known = [v for v in views if v is not None]
        if len(known) != len(views) or len({v.source.shape for v in known}) > 1:
            raise MergeError(
                f"{target!r} is a saved tensor in some adapters, but has another shape or is absent in others: "
                f"{[list(v.source.shape) for v in known]}. Give output='model' and vocab='extend'."
            )
        kind = dtype or _widest([v.source.dtype for v in known])
        stored_as = next(adapter.saved[target].name for _, adapter in adapted if target in adapter.saved)
        module, _, last = stored_as.replace(".base_layer.", ".").rpartition(".")
        # For an adapted module, PEFT looks for its own tensors in the layer below the adapter; elsewhere it drops them.
        below = ".base_layer" if module.removeprefix(_PREFIX) in ranks else ""
        name = f"{module}{below}.{last}"
        stored = [type(v)(v.source) for v in known]
        outputs.append(OutputTensor(name, kind, known[0].source.shape, (combined(stored, kind, rule_for(target)),)))
    return outputs, ranks


def _products(
    adapted: Sequence[tuple[int, Adapter]],
    rule_for: Callable[[str], Rule],
    rank: int | None,
    dtype: str | None,
    errors: dict[str, float],
) -> tuple[list[OutputTensor], dict[str, int]]:
    """The factors of each module, and their ranks."""
    outputs, ranks = [], {}
    for target in sorted({t for _, adapter in adapted for t in adapter.factors}):
        weights = weights_of(rule_for(target))
        assert weights is not None
        parts = [(weights[i], adapter.factors[target]) for i, adapter in adapted if target in adapter.factors]
        first = parts[0][1]
        module = re.sub(r"\.lora_(embedding_)?A(\.weight)?$", "", first.a.name).removeprefix(_PREFIX)
        product = Product(parts, rank, lambda e, module=module: errors.__setitem__(module, e))
        kind = dtype or _widest([f.a.dtype for _, f in parts] + [f.b.dtype for _, f in parts])
        told: dict[str, Any] = {"scratch": product.scratch, "also": product.stored}
        outputs.append(OutputTensor(first.a.name, kind, (product.rank, first.a.shape[1]), produce=product.a, **told))
        outputs.append(OutputTensor(first.b.name, kind, (first.b.shape[0], product.rank), produce=product.b, **told))
        ranks[module] = product.rank
    return outputs, ranks


def adapter_config(members: Sequence[Member], ranks: dict[str, int]) -> dict[str, Any]:
    """The configuration under which PEFT loads the merged adapter.

    Args:
        members: The models; the newest adapter's configuration is the template.
        ranks: Rank of each module.

    Returns:
        ``adapter_config.json`` as data; every module has scaling 1.
    """
    adapted = [(m.checkpoint, m.adapter) for m in members if m.adapter is not None]
    configs, base = [dict(adapter.checkpoint.config) for _, adapter in adapted], adapted[-1][0]
    named = base.hub_id or configs[-1].get("base_model_name_or_path") or str(base.folder)
    config, most = configs[-1], max(ranks.values(), default=1)
    different = {re.escape(m): r for m, r in ranks.items() if r != most}
    saved = sorted({s for c in configs for s in (c.get("modules_to_save") or ())})
    biases = {c.get("bias", "none") for c in configs} - {"none"}
    return config | {
        "base_model_name_or_path": named, "r": most, "lora_alpha": most, "rank_pattern": different, "alpha_pattern": dict(different), "use_rslora": False,
        "init_lora_weights": True, "inference_mode": True, "target_modules": sorted(ranks), "exclude_modules": None,
        "layers_to_transform": None, "layers_pattern": None, "modules_to_save": saved or None,
        "bias": "none" if not biases else biases.pop() if len(biases) == 1 else "all",
    }  # fmt: skip


def _widest(dtypes: Sequence[str]) -> str:
    wide = DTYPES[dtypes[0]]
    for dtype in dtypes[1:]:
        wide = torch.promote_types(wide, DTYPES[dtype])
    return next(name for name, torch_type in DTYPES.items() if torch_type == wide)
