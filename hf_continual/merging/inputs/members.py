"""A model as it takes part in a merge: full weights, or a base with an adapter that is never merged into it as a whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

from hf_continual.merging.errors import MergeError
from hf_continual.merging.inputs.adapter import Adapter, Factors, read_adapters
from hf_continual.merging.inputs.adapter_base import base_as_asked
from hf_continual.merging.inputs.checkpoint import Checkpoint, open_checkpoint
from hf_continual.merging.inputs.quantization import QuantizedBase, read_quantized_base
from hf_continual.merging.inputs.safetensors_file import StoredTensor
from hf_continual.merging.inputs.structure import HEAD, embedding_name, head_name, is_head


@dataclass(frozen=True)
class View:
    """A tensor in one model: stored values, and what an adapter adds to them.

    Args:
        source: The stored values.
        factors: The adapter's product, or None.
        added: A vector to add to a bias and its scale, or None.
    """

    source: StoredTensor
    factors: Factors | None = None
    added: tuple[StoredTensor, float] | None = None

    @property
    def is_stored(self) -> bool:
        """Whether the values can be read unchanged."""
        return self.factors is None and self.added is None


@dataclass(frozen=True)
class Member:
    """A model that takes part.

    Args:
        checkpoint: Full weights.
        adapter: The adapter applied to them, or None.
    """

    checkpoint: Checkpoint
    adapter: Adapter | None = None

    @property
    def own(self) -> Checkpoint:
        """The checkpoint the user named: the adapter's, or the model's."""
        return self.checkpoint if self.adapter is None else self.adapter.checkpoint

    @property
    def name(self) -> str:
        """Its name in messages and reports."""
        return self.own.name

    @cached_property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        base = self.checkpoint
        if head_name(base) is not None:
            return False
        if self.adapter is None or self.adapter.checkpoint.config.get("ensure_weight_tying"):
            return True
        changed = self.adapter.factors.keys() | self.adapter.saved.keys()
        embedding = embedding_name(base)
        # An adapter that trains one of two tied matrices leaves the other unchanged: from then on there are two.
        return embedding not in changed and not any(n not in base.tensors for n in changed)

    def view(self, name: str) -> View | None:
        """Find a tensor of this model; None if it has no such tensor.

        Args:
            name: A tensor's name in the full model; the head's name gives the embedding if the two are tied.

        Returns:
            Where its values come from.
        """
        base, adapter = self.checkpoint, self.adapter
        stored = base.tensors.get(name)
        if stored is None and name.endswith(".weight") and is_head(name):
            embedding = embedding_name(base)
            if self.tied and embedding != name:
                return self.view(embedding) if embedding else None
            stored = base.tensors.get(embedding) if embedding else None
        if adapter is None:
            return None if stored is None else View(stored)
        stored = adapter.saved.get(name, stored)
        return None if stored is None else View(stored, adapter.factors.get(name), adapter.added.get(name))

    @property
    def names(self) -> list[str]:
        """Its tensors, in the order of the base's files; the head only where it is not the embedding."""
        stored = list(self.checkpoint.tensors)
        if self.tied or head_name(self.checkpoint) is not None:
            return stored
        assert self.adapter is not None
        changed = [*self.adapter.factors, *self.adapter.saved]
        return [*stored, next((n for n in changed if n not in self.checkpoint.tensors), HEAD)]


def check_list(models: Any) -> None:
    """Refuse anything but a list of models."""
    if isinstance(models, str | os.PathLike) or not models:
        raise ValueError(f"models={models!r}: give a list of at least one folder or Hub id.")


def open_members(
    models: Sequence[str | os.PathLike[str]],
    base: str | os.PathLike[str] | None,
    quantized_base: QuantizedBase = "original",
) -> tuple[list[Member], Checkpoint | None]:
    """Open full models and adapters on a base.

    Args:
        models: Folders or Hub ids.
        base: The full model that the adapters belong to.
        quantized_base: Base weights for adapters that were trained on a quantised base, see `OutputOptions`.

    Returns:
        The models in order, and the base.

    Raises:
        ValueError: If there is no model, or an adapter without a base.
        MergeError: If an adapter does not fit, or two were trained on different bases.
    """
    check_list(models)
    full = None if base is None else open_checkpoint(base)
    if full is not None and full.is_adapter:
        raise ValueError(
            f"base={str(base)!r} is an adapter, but the base must be the full model that adapters were trained on."
        )
    opened = [open_checkpoint(model) for model in models]
    if full is None and read_quantized_base(quantized_base) != "original":
        raise ValueError(
            f"quantized_base={quantized_base!r} applies to base=, which was not given. Give it, or leave both out."
        )
    if full is not None:
        full = base_as_asked(full, [c for c in opened if c.is_adapter], quantized_base)
    adapters = iter(() if full is None else read_adapters([c for c in opened if c.is_adapter], full))
    members = []
    for found in opened:
        if not found.is_adapter:
            members.append(Member(found))
        elif full is None:
            wanted = found.config.get("base_model_name_or_path")
            raise ValueError(f"{found.name} is an adapter: give base=, the full model it was trained on ({wanted!r}).")
        else:
            members.append(Member(full, next(adapters)))
    check_one_base([m.adapter.checkpoint for m in members if m.adapter is not None])
    return members, full


def check_one_base(adapters: Sequence[Checkpoint]) -> None:
    """Refuse adapters whose configurations name different models."""
    # Every pair: a configuration that names no base, or a folder, must not hide a contradiction between others.
    for first, other in combinations(adapters, 2):
        for key in ("base_model_name_or_path", "revision"):
            one, two = first.config.get(key), other.config.get(key)
            # Folders differ between machines; ids and revisions do not.
            if one and two and one != two and not any(os.path.isabs(x) or x.startswith(".") for x in (one, two)):
                raise MergeError(
                    f"{first.name} was trained on {one!r} ({key}) but {other.name} on {two!r}: their changes belong to "
                    f"different weights. Merge each into its own base (merge_and_unload) and merge the full models."
                )
