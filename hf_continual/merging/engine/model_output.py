"""The plan of a full model's tensors: what each is made from, and whether the head stays tied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

from hf_continual.merging.engine.average import Average
from hf_continual.merging.engine.chunks import OutputTensor, Part, chunks, stream
from hf_continual.merging.engine.combine import combined
from hf_continual.merging.engine.rules import Rule, weights_of
from hf_continual.merging.errors import MergeError
from hf_continual.merging.inputs.checkpoint import Checkpoint
from hf_continual.merging.inputs.compatibility import check_shapes, tensor_names
from hf_continual.merging.inputs.members import Member, View
from hf_continual.merging.inputs.structure import TEXT_PARTS, embedding_name, find_embedding, head_name, is_head


def model_tensors(
    members: Sequence[Member], rule_for: Callable[[str], Rule], dtype: str | None, vocab: str, notes: list[str]
) -> list[OutputTensor]:
    """The tensors of the merged model.

    Args:
        members: The models, in the rule's order; the first gives the order of tensors and their dtypes.
        rule_for: Name of a tensor -> its rule.
        dtype: dtype of the output, or None to keep the first model's, tensor by tensor.
        vocab: ``"strict"`` or ``"extend"``.
        notes: Receives notes for the user.

    Returns:
        The tensors in order.

    Raises:
        MergeError: If names or shapes do not fit.
    """
    names = tensor_names(members)
    head = next((n for m in members if (n := head_name(m.checkpoint)) is not None), None)
    if head is not None and all(_head_says_nothing(m) for m in members):
        names.remove(head)
        notes.append(f"{head} equals the embedding it is tied to, in every model; it is not stored a second time.")
    outputs = []
    types: dict[str, set[str]] = {}
    for name in names:
        views = [v for m in members if (v := m.view(name)) is not None]
        kind = dtype if dtype is not None and views[0].source.is_float else views[0].source.dtype
        for member, view in zip(members, views, strict=True):
            types.setdefault(member.checkpoint.name, set()).add(view.source.dtype)
        if check_shapes(name, members, views, vocab):
            outputs.append(_extended(name, kind, members, views, rule_for(name), notes))
        else:
            outputs.append(OutputTensor(name, kind, views[0].source.shape, (combined(views, kind, rule_for(name)),)))
    if len({frozenset(t) for t in types.values()}) > 1:
        notes.append(
            f"The models are stored in different dtypes: {', '.join(f'{n} {sorted(t)}' for n, t in types.items())}."
        )
    return outputs


def _head_says_nothing(member: Member) -> bool:
    """Whether a model's head is its embedding: not stored, or stored with the same bytes under a configuration that ties them."""
    base = member.checkpoint
    head, embedding = head_name(base), embedding_name(base)
    if head is None:
        return member.tied
    changed = member.adapter is not None and (
        {head, embedding} & (member.adapter.factors.keys() | member.adapter.saved.keys())
    )
    if changed or embedding is None or not base.config.get("tie_word_embeddings"):
        return False
    if (
        base.tensors[head].shape != base.tensors[embedding].shape
        or base.tensors[head].dtype != base.tensors[embedding].dtype
    ):
        return False
    same = stream(head, base.tensors[head].dtype, [base.tensors[head], base.tensors[embedding]], None)
    read = chunks([same])
    try:
        return all(torch.equal(*chunk.values) for _, _, chunk in read)
    finally:
        read.close()


def _extended(
    name: str, kind: str, members: Sequence[Member], views: Sequence[View], rule: Rule, notes: list[str]
) -> OutputTensor:
    """Take rows that only some models have from those models, with their weights renormalised."""
    weighed = weights_of(rule)
    summed = all(v.added is None and (v.factors is None or v.factors.magnitude is None) for v in views)
    if weighed is None or not summed:
        raise MergeError(
            f"vocab='extend' works only for averages without DoRA; {name!r} has {[v.source.shape[0] for v in views]} rows. "
            f"Resize the models to one vocabulary first (resize_token_embeddings)."
        )
    parts: list[Part] = []
    borders = sorted({v.source.shape[0] for v in views})
    for first, last in zip([0, *borders[:-1]], borders, strict=True):
        having = [(v, w) for v, w in zip(views, weighed, strict=True) if v.source.shape[0] >= last]
        total = sum(w for _, w in having)
        weights = tuple(w / total if total > 0 else 1 / len(having) for _, w in having)
        # A chunk knows its place in the whole tensor, so a product is computed at these rows.
        rows = [View(v.source.rows(first, last), v.factors) for v, _ in having]
        parts.append(combined(rows, kind, Average(weights)))
        if first:
            who = [m.name for m, v in zip(members, views, strict=True) if v.source.shape[0] >= last]
            notes.append(
                f"{name}: rows {first} to {last - 1} exist in {', '.join(who)} only, with weights {list(weights)}."
            )
    return OutputTensor(name, kind, (borders[-1], *views[0].source.shape[1:]), tuple(parts))


def model_config(reference: Checkpoint, outputs: Sequence[OutputTensor], dtype: str | None) -> dict[str, Any]:
    """``config.json`` of the output: the reference's, corrected where the output differs.

    Args:
        reference: The first model.
        outputs: The output's tensors.
        dtype: The output's dtype as transformers spells it, or None if it was not changed.

    Returns:
        The configuration; equal to the reference if nothing needs correcting.
    """
    config = dict(reference.config)
    shapes = {t.name: t.shape for t in outputs}
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        config[key] = dtype
    if any(is_head(name) and name.endswith(".weight") for name in shapes):
        # If the key is missing, an architecture's own default decides, and it ties if the reference has no head.
        config = _with(config, "tie_word_embeddings", False, add_to=() if head_name(reference) else ("",))
    embedding, before = find_embedding(shapes), embedding_name(reference)
    if embedding is not None and prod(shapes[embedding]):
        rows = shapes[embedding][0]
        more = 0 if before is None else rows - reference.tensors[before].shape[0]
        if more:
            parts = [part for k in TEXT_PARTS if isinstance(part := config.get(k), dict)]
            said = next((n for part in (*parts, config) if (n := part.get("vocab_size")) is not None), rows - more)
            # Not the rows themselves: Mllama's embedding has more than its vocabulary.
            add_to = [k for k in TEXT_PARTS if k in config][:1] or [""]
            config = _with(config, "vocab_size", said + more, add_to=add_to)
    return config


def _with(config: dict[str, Any], key: str, value: Any, add_to: Sequence[str]) -> dict[str, Any]:
    """Correct a key of the language model's configuration, at the top level and in the nested text configuration.

    Args:
        config: The configuration.
        key: The key.
        value: The correct value.
        add_to: Parts that get the key if they lack it; ``""`` is the top level.

    Returns:
        The configuration, with ``value`` wherever the key had another value.
    """
    parts = {"": config, **{k: part for k in TEXT_PARTS if isinstance(part := config.get(k), dict)}}
    wrong = [
        k for k, part in parts.items() if part.get(key) not in (None, value) or (k in add_to and part.get(key) is None)
    ]
    inner = {k: {**parts[k], key: value} for k in wrong if k}
    return {**config, **inner, **({key: value} if "" in wrong else {})}
