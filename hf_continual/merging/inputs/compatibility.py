"""Whether models can be merged at all: names, shapes, tokenizers. Only headers and JSON are read."""

from __future__ import annotations

import filecmp
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path

from hf_continual.atomic_files import read_object
from hf_continual.merging.errors import MergeError, as_merge_error, some
from hf_continual.merging.inputs.members import Member, View
from hf_continual.merging.inputs.structure import embedding_name, is_head
from hf_continual.merging.inputs.tokenizer_files import tokenizer_folder, vocabulary


def tensor_names(members: Sequence[Member]) -> list[str]:
    """The output's tensors; every model must have them.

    A head is among them only if a model holds one that is not its embedding.

    Args:
        members: The models; the order of the first is kept.

    Returns:
        Names in order.

    Raises:
        MergeError: If a model lacks tensors that another has.
    """
    names = list(dict.fromkeys(n for m in members for n in m.names))
    for member in members:
        if lacking := [n for n in names if member.view(n) is None]:
            other = next(m for m in members if any(n in m.names for n in lacking))
            only = [n for n in member.names if other.view(n) is None]
            raise MergeError(
                f"architecture mismatch: {other.name} has {len(lacking)} tensors that {member.name} does not have ({some(lacking)})"
                + (
                    f", and {member.name} has {len(only)} that {other.name} does not have ({some(only)})"
                    if only
                    else ""
                )
                + ". Only models of one architecture can be merged; if these are, save both with the same transformers version."
            )
    return names


def check_shapes(name: str, members: Sequence[Member], views: Sequence[View], vocab: str) -> bool:
    """Compare a tensor's shapes.

    Args:
        name: The tensor.
        members: The models.
        views: The tensor in each.
        vocab: ``"strict"`` or ``"extend"``.

    Returns:
        Whether it has rows that only some models have, which ``vocab="extend"`` allows for embedding and head.

    Raises:
        MergeError: If shapes differ.
    """
    first = views[0].source.shape
    for member, view in zip(members[1:], views[1:], strict=True):
        shape = view.source.shape
        if shape == first:
            if view.source.dtype != views[0].source.dtype and not (view.source.is_float and views[0].source.is_float):
                raise MergeError(
                    f"{name!r} is {views[0].source.dtype} in {members[0].name} but {view.source.dtype} in {member.name}. "
                    f"Save both in one floating-point dtype."
                )
            continue
        rows = len(shape) == len(first) and shape[1:] == first[1:] and len(shape) > 0
        vocabulary = name == embedding_name(member.checkpoint) or is_head(name)
        if rows and vocabulary and vocab == "extend":
            continue
        hint = ""
        if rows and vocabulary:
            hint = (
                " The vocabularies differ: if the longer one only continues the shorter, vocab='extend' keeps its additional "
                "rows; otherwise resize one model first (resize_token_embeddings)."
            )
        raise MergeError(
            f"shape mismatch: {name!r} is {list(first)} in {members[0].name} but {list(shape)} in {member.name}.{hint}"
        )
    return any(v.source.shape != first for v in views)


def check_tokenizers(members: Sequence[Member], vocab: str) -> list[str]:
    """Compare which token each id stands for.

    Args:
        members: The models; those without tokenizer files are skipped.
        vocab: ``"extend"`` allows a vocabulary to continue a shorter one.

    Returns:
        Notes on what is unknown, and on harmless differences.

    Raises:
        MergeError: If an id stands for different tokens.
    """
    notes = []
    found = [(m, file) for m in members if (file := tokenizer_folder(m) / "tokenizer.json").is_file()]
    notes += [
        f"{m.name} has no tokenizer.json; its vocabulary was not compared."
        for m in members
        if m not in [x for x, _ in found]
    ]
    read = cache(lambda file: vocabulary(file.parent) or {})
    notes += [n for m, file in found for n in _without_rows(m, read(file))]
    # Every pair: the shortest of three vocabularies may agree with two that contradict each other after its end.
    for (first, reference), (member, file) in combinations(found, 2):
        if filecmp.cmp(reference, file, shallow=False):
            continue
        one, two = read(reference), read(file)
        shared = one.keys() & two.keys()
        wrong = [i for i in sorted(shared) if one[i] != two[i]]
        if wrong or (len(one) != len(two) and vocab == "strict"):
            met = (
                f"id {wrong[0]} is {one[wrong[0]]!r} in one and {two[wrong[0]]!r} in the other"
                if wrong
                else f"{len(one)} and {len(two)} tokens"
            )
            raise MergeError(
                f"tokenizer mismatch between {first.name} and {member.name}: {met}. Their embeddings mean different tokens; "
                f"merge models of one tokenizer"
                + ("." if wrong else ", or give vocab='extend' if the longer continues the shorter.")
            )
        if first is found[0][0]:
            notes.append(f"tokenizer.json of {member.name} differs from {first.name}'s, with the same ids.")
    return notes


def _without_rows(member: Member, vocabulary: Mapping[int, str]) -> list[str]:
    """A note for a model whose tokenizer has ids without rows in its embedding."""
    name = embedding_name(member.checkpoint)
    view = None if name is None else member.view(name)
    if name is None or view is None:
        return []
    tokens, rows = {**_added(tokenizer_folder(member)), **vocabulary}, view.source.shape[0]
    if not (beyond := sorted(i for i in tokens if i >= rows)):
        return []
    return [
        f"The tokenizer of {member.name} has {max(tokens) + 1} tokens but {name} has {rows} rows: id {beyond[0]} "
        f"({tokens[beyond[0]]!r}) has none, so a text with it fails. Load the result and "
        f"resize_token_embeddings({max(tokens) + 1}), or remove the token from the tokenizer."
    ]


def _added(folder: Path) -> dict[int, str]:
    """Tokens that are stored outside tokenizer.json, in the two forms that transformers reads."""
    added: dict[int, str] = {}
    with as_merge_error():
        if (file := folder / "added_tokens.json").is_file():
            added |= {i: t for t, i in read_object(file).items() if isinstance(i, int)}
        if (file := folder / "tokenizer_config.json").is_file():
            listed = read_object(file).get("added_tokens_decoder") or {}
            added |= {int(i): str(t.get("content")) for i, t in listed.items() if i.isdecimal() and isinstance(t, dict)}
    return added


def warn_alone(members: Sequence[Member]) -> None:
    """Warn if there is nothing to merge: one full model comes out as it went in."""
    if len(members) == 1 and members[0].adapter is None:
        warnings.warn(
            f"{members[0].name} is the only model: the output is a copy of it. Name a second model if that is not meant; a "
            f"pattern such as runs/*/ may have matched one folder only.",
            UserWarning,
            stacklevel=4,
        )


def warn_identical(members: Sequence[Member]) -> None:
    """Warn if two models are the same: the average counts them twice, which is rarely intended."""
    seen: dict[str, list[str]] = {}
    for member in members:
        seen.setdefault(member.own.fingerprint, []).append(member.name)
    if same := [names for names in seen.values() if len(names) > 1]:
        warnings.warn(
            f"{'; '.join(' and '.join(names) for names in same)} are the same weights (equal headers, sizes and beginnings of "
            f"all tensors): the merge counts them more than once. Leave them out if that is not intended.",
            UserWarning,
            stacklevel=4,
        )
