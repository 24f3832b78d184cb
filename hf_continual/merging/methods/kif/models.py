"""The models of a fusion: base, new and old, opened and compared; and which tensors changed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch

from hf_continual.merging.engine.chunks import OutputTensor
from hf_continual.merging.errors import MergeError, some
from hf_continual.merging.inputs.adapter_options import check_numbers
from hf_continual.merging.inputs.adapter_parts import split
from hf_continual.merging.inputs.adapter_saved import check_announced
from hf_continual.merging.inputs.checkpoint import Checkpoint, open_checkpoint
from hf_continual.merging.inputs.compatibility import tensor_names
from hf_continual.merging.inputs.members import Member, check_one_base
from hf_continual.merging.inputs.pieces import pieces_of
from hf_continual.merging.inputs.safetensors_file import Files, StoredTensor
from hf_continual.merging.methods.base import Models

# Settings of an adapter that do not affect what its factors mean.
_HARMLESS = (
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "init_lora_weights", "lora_dropout",
    "peft_version", "task_type", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config",
    "megatron_core", "runtime_config", "ensure_weight_tying",
)  # fmt: skip
FAR = 1.0  # of a factor A's own norm; two independent initialisations are 1.4 apart, training moves it far less


@dataclass(frozen=True)
class FusedModels(Models):
    """The models of a fusion, all full or all adapters: the base of both changes, the model that learned the new task, and the
    model that learned the old ones, unless it equals the base."""

    @property
    def start(self) -> Member:
        """The model that both changes are measured from."""
        return self.members[0]

    @property
    def new(self) -> Member:
        """The model that learned the new task."""
        return self.members[1]

    @property
    def old(self) -> Member | None:
        """The model that learned the old tasks, or None if it equals the base."""
        return self.members[2] if len(self.members) > 2 else None

    @property
    def roles(self) -> list[tuple[str, Member]]:
        """The models with their names in reports."""
        return list(zip(("base", "new", "old"), self.members, strict=False))

    def of(self, side: str) -> Member:
        """The model that a side's importance is measured on: that side's, or the base if there is no old model."""
        return self.new if side == "new" else self.old or self.start

    @property
    def are_adapters(self) -> bool:
        """Whether factors are fused."""
        return self.start.checkpoint.is_adapter

    def sources(self, name: str) -> list[StoredTensor]:
        """A tensor's stored values in each model."""
        views = [m.view(name) for m in self.members]
        return [v.source for v in views if v is not None]


def open_fused(
    base: str | os.PathLike[str], new: str | os.PathLike[str], old: str | os.PathLike[str] | None
) -> FusedModels:
    """Open the models and compare names, shapes, ranks and bases.

    Args:
        base: Folder or Hub id.
        new: Folder or Hub id.
        old: Folder or Hub id, or None.

    Returns:
        The models; only headers are read.

    Raises:
        ValueError: If some are adapters and others are not.
        MergeError: If they do not fit, with the names of the first tensors.
    """
    found = [open_checkpoint(m) for m in (base, new, *([] if old is None else [old]))]
    if len(found) == 3 and found[2].folder.resolve() == found[0].folder.resolve():
        found.pop()  # it equals the base, which its absence expresses
    _check_kinds(found)
    models = FusedModels(tuple(map(Member, found)), None, from_base=True, newest=1)
    _check_shapes(models)
    if models.are_adapters:
        _check_settings(found)
        for adapter in found:
            if adapter.config.get("peft_type") == "LORA":
                check_numbers(adapter)
                check_announced(adapter, split(adapter).others)
        _check_bases(found)
        _warn_far(models)
    return models


def _check_kinds(found: Sequence[Checkpoint]) -> None:
    kinds = [c.is_adapter for c in found]
    if len(set(kinds)) == 1:
        return
    told = ", ".join(
        f"{role} {c.name!r} is {'an adapter' if c.is_adapter else 'a full model'}"
        for role, c in zip(("base", "new", "old"), found, strict=False)
    )
    if not kinds[0]:
        raise ValueError(
            f"{told}. Factors can be fused element by element only if they continued from the same factors, and a full model "
            f"does not say which those were: LoRA draws them at random. Give base=, the adapter that the others continued from "
            f"(of the earlier task, or the untrained one, saved before the first step); or merge each adapter into the model "
            f"(merge_and_unload, save_pretrained) and fuse the full models."
        )
    raise ValueError(f"{told}. Give adapters only, or full models only.")


def _check_shapes(models: FusedModels) -> None:
    if models.are_adapters:
        everywhere = {m.name: m.checkpoint.tensors.keys() for m in models.members}
        union = set().union(*everywhere.values())
        for name, keys in everywhere.items():
            if missing := union - keys:
                raise MergeError(
                    f"{name} lacks {len(missing)} tensors that the others have ({some(missing)}): the adapters are on "
                    f"different modules. Only adapters with the same target_modules can be fused."
                )
    names = list(models.start.checkpoint.tensors) if models.are_adapters else tensor_names(models.members)
    wrong: dict[str, list[str]] = {}
    for name in names:
        shapes = [s.shape for s in models.sources(name)]
        if len(set(shapes)) > 1:
            told = (f"{list(s)} in {role}" for s, (role, _) in zip(shapes, models.roles, strict=True))
            wrong[name] = [f"{name!r} is {', '.join(told)}"]
    if wrong:
        ranks = models.are_adapters and all(".lora_" in n for n in wrong)
        kind, way = (
            ("rank mismatch", "Train the adapters with one rank; base, new and old share their factors' shapes.")
            if ranks
            else ("shape mismatch", "Fuse models that were trained from the same base.")
        )
        raise MergeError(
            f"{kind}: {len(wrong)} of {len(names)} tensors differ. {some([w[0] for w in wrong.values()])}. {way}"
        )


def _check_settings(found: Sequence[Checkpoint]) -> None:
    first = found[0]
    for other in found[1:]:
        for key in sorted(first.config.keys() | other.config.keys()):
            one, two = first.config.get(key), other.config.get(key)
            same = set(one) == set(two) if isinstance(one, list) and isinstance(two, list) else one == two
            if key not in _HARMLESS and not same and (one or two):
                raise MergeError(
                    f"{first.name} has {key}={one!r} and {other.name} {key}={two!r}: the same factors mean different things. "
                    f"Only adapters of one configuration can be fused element by element."
                )


def _check_bases(found: Sequence[Checkpoint]) -> None:
    check_one_base(found)
    for first, other in combinations(found, 2):
        folders = [Path(str(c.config.get("base_model_name_or_path") or "")) for c in (first, other)]
        if folders[0] == folders[1] or not all(os.path.isdir(f) and str(f) != "." for f in folders):
            continue
        one, two = (open_checkpoint(f) for f in folders)
        if one.fingerprint != two.fingerprint:
            raise MergeError(
                f"{first.name} was trained on {one.name} and {other.name} on {two.name}, which are different weights: "
                f"their factors cannot be fused. Merge each into its own base (merge_and_unload) and fuse the full models."
            )


def _warn_far(models: FusedModels) -> None:
    factors = [n for n in models.start.checkpoint.tensors if ".lora_A" in n]
    with Files() as files:
        for role, member in models.roles[1:]:
            moved = size = 0.0
            for name in factors:
                anchor = files.load(models.start.checkpoint.tensors[name]).double()
                moved += float((files.load(member.checkpoint.tensors[name]).double() - anchor).square().sum())
                size += float(anchor.square().sum())
            if size and (distance := (moved / size) ** 0.5) > FAR:
                warnings.warn(
                    f"The factors A of {role} ({member.name}) are {distance:.1f} times their norm away from those of base "
                    f"({models.start.name}): it probably did not continue from that adapter, in which case elements do not correspond "
                    f"to each other. Give base=, the adapter that both were trained from.",
                    UserWarning,
                    stacklevel=4,
                )


def changed_tensors(models: FusedModels, outputs: Sequence[OutputTensor]) -> list[str]:
    """Find tensors that are not the same in all models; for a changed one, little is read.

    Args:
        models: The models.
        outputs: The tensors.

    Returns:
        Their names, in order.
    """
    found = []
    with Files() as files:
        for output in outputs:
            sources = models.sources(output.name)
            if sources[0].is_float and any(_differ(sources[0], other, files) for other in sources[1:]):
                found.append(output.name)
    return found


def _differ(one: StoredTensor, two: StoredTensor, files: Files) -> bool:
    """Whether two stored tensors differ in value; values of different dtypes are compared in the wider one."""
    for values in pieces_of([one, two], files):
        if not torch.equal(*(values if one.dtype == two.dtype else [v.double() for v in values])):
            return True
    return False
