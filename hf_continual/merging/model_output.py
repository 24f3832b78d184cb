"""The plan of a full model's tensors: what each is made of, and whether the head stays tied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch

from hf_continual.merging.average import Average
from hf_continual.merging.checks import check_shapes, tensor_names
from hf_continual.merging.chunks import OutputTensor, Part, chunks, stream
from hf_continual.merging.combine import combined
from hf_continual.merging.errors import MergeError
from hf_continual.merging.members import Member, View
from hf_continual.merging.rules import Rule, weights_of
from hf_continual.merging.structure import HEADS, embedding_name, head_name


def model_tensors(
    members: Sequence[Member], rule_for: Callable[[str], Rule], dtype: str | None, vocab: str, notes: list[str]
) -> list[OutputTensor]:
    """The tensors of the merged model.

    Args:
        members: The models, in the rule's order; the first gives the order of tensors and their types.
        rule_for: Name of a tensor -> its rule.
        dtype: Type of the output, or None for the first model's, tensor by tensor.
        vocab: ``"strict"`` or ``"extend"``.
        notes: Gets a sentence for what the user should know.

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
            f"The models are stored in different types: {', '.join(f'{n} {sorted(t)}' for n, t in types.items())}."
        )
    return outputs


def _head_says_nothing(member: Member) -> bool:
    """Whether a model's head is its embedding: not stored, or stored with the same bytes under a configuration that ties."""
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
    """Rows that only some models have come from those, with their weights renormalised."""
    weighed = weights_of(rule)
    summed = all(v.added is None and (v.factors is None or v.factors.magnitude is None) for v in views)
    if weighed is None or not summed:
        raise MergeError(
            f"vocab='extend' works for averages, and without DoRA; {name!r} has {[v.source.shape[0] for v in views]} rows. "
            f"Resize the models to one vocabulary first (resize_token_embeddings)."
        )
    parts: list[Part] = []
    borders = sorted({v.source.shape[0] for v in views})
    for first, last in zip([0, *borders[:-1]], borders, strict=True):
        having = [(v, w) for v, w in zip(views, weighed, strict=True) if v.source.shape[0] >= last]
        total = sum(w for _, w in having)
        weights = tuple(w / total if total > 0 else 1 / len(having) for _, w in having)
        # A chunk knows its place in the whole tensor, so that a product is taken at these rows.
        rows = [View(v.source.rows(first, last), v.factors) for v, _ in having]
        parts.append(combined(rows, kind, Average(weights)))
        if first:
            who = [m.name for m, v in zip(members, views, strict=True) if v.source.shape[0] >= last]
            notes.append(
                f"{name}: rows {first} to {last - 1} exist in {', '.join(who)} only, with weights {list(weights)}."
            )
    return OutputTensor(name, kind, (borders[-1], *views[0].source.shape[1:]), tuple(parts))


def model_config(reference: Mapping[str, Any], outputs: Sequence[OutputTensor], dtype: str | None) -> dict[str, Any]:
    """``config.json`` of the output: the reference's, corrected where the output differs.

    Args:
        reference: The first model's configuration.
        outputs: The output's tensors.
        dtype: Name of the output's type as transformers spells it, or None if it was not changed.

    Returns:
        The configuration; equal to the reference where nothing has to be said.
    """
    config = dict(reference)
    names = {t.name: t for t in outputs}
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        config[key] = dtype
    has_head = any(head in names for head in HEADS)
    # Where the key is missing, an architecture's own default decides; it is corrected only if it says what is not so.
    if has_head and config.get("tie_word_embeddings", True) and "tie_word_embeddings" in config:
        config["tie_word_embeddings"] = False
    embedding = next((t for n, t in names.items() if n.endswith(("embed_tokens.weight", "wte.weight"))), None)
    if embedding is not None and prod(embedding.shape) and config.get("vocab_size") not in (None, embedding.shape[0]):
        config["vocab_size"] = embedding.shape[0]
    return config
