"""What an adapter's file holds besides its products, by the names of its base: saved modules, biases, a resized embedding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from hf_continual.merging.errors import MergeError, some
from hf_continual.merging.inputs.adapter_parts import PREFIX, Parts
from hf_continual.merging.inputs.checkpoint import ADAPTER_CONFIG, Checkpoint
from hf_continual.merging.inputs.pieces import pieces_of
from hf_continual.merging.inputs.safetensors_file import DTYPES, Files, StoredTensor
from hf_continual.merging.inputs.structure import HEAD, embedding_name, head_name, is_head

# Tasks whose models have another head than a language model's, and how transformers calls these models.
_TASKS = {
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
    "QUESTION_ANS": "QuestionAnswering",
}

_CLASSIFIERS = ("classifier", "score")  # PEFT announces both for these tasks; a model has one


def saved_tensors(
    parts: Parts, base: Checkpoint, adapter: Checkpoint, names: Mapping[str, str]
) -> dict[str, StoredTensor]:
    """The tensors of the base that an adapter replaces, as PEFT loads its file.

    Args:
        parts: What the file holds.
        base: The full model.
        adapter: The adapter.
        names: Name in the loaded model -> name in the base's files, where the two differ.

    Returns:
        Name in the base -> what replaces it, under PEFT's name.

    Raises:
        MergeError: If the base has no such tensor, or another shape that is not a longer vocabulary.
    """
    _check_task(adapter, base)
    saved: dict[str, StoredTensor] = {}
    shared: dict[str, StoredTensor] = {}
    for name, tensor in parts.others.items():
        if ".original_module." in name:
            continue  # the original of a saved module; it is not used
        plain = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        if ".modules_to_save." in name and plain in parts.others:
            continue  # a duplicate, which PEFT ignores
        target = find(plain, base, adapter, names, saved=True)
        stored = replace(tensor, name=PREFIX + plain)
        _check_shape(target, stored, base, adapter)
        if name.endswith(".base_layer.weight") and _same(_base_tensor(base, target), tensor):
            continue  # PEFT stores an adapted embedding's weights along with its adapter; these are the base's
        saved[target] = stored
        if ".base_layer." not in name and _is_module_of_its_own(plain, adapter):
            continue
        # It replaces the base's matrix, which is both embedding and head where the two are tied.
        for other in _tied_with(target, base):
            shared[other] = replace(tensor, name=PREFIX + _loaded_name(other, parts.factors, base))
    saved = {**shared, **saved}
    _check_rows(saved, base, adapter)
    return saved


def find(name: str, base: Checkpoint, adapter: Checkpoint, names: Mapping[str, str], saved: bool = False) -> str:
    """Find the base's name of an adapter's tensor; some base checkpoints omit the prefix of the inner model.

    Args:
        name: The name without PEFT's prefix.
        base: The full model.
        adapter: The adapter.
        names: Name in the loaded model -> name in the base's files, where the two differ.
        saved: Whether the tensor is a saved weight of the adapter, not a product.

    Returns:
        The name in the base; for a tied head that is not stored, the name that it would have.

    Raises:
        MergeError: If there is no such tensor.
    """
    # If the architecture is not known: some base checkpoints omit the prefix of the inner model.
    for candidate in (names.get(name, name), name.partition(".")[2]):
        if candidate in base.tensors:
            return candidate
    if is_head(name) and _is_tied(base):
        return name  # a tied head is not stored; it is the embedding until the adapter changes it
    if saved and _is_module_of_its_own(name, adapter):
        raise MergeError(
            f"{adapter.name} has a saved module {name!r} (modules_to_save={adapter.config['modules_to_save']!r}), that "
            f"{base.name} ({_kind(base)}) does not have: it is the head of another kind of model, such as a classifier. "
            f"{_other_head('its own class')}"
        )
    raise MergeError(
        f"{adapter.name} adapts {name!r}, but {base.name} has no such tensor (it has {next(iter(base.tensors))!r}, ...). The "
        f"adapter belongs to another base ({adapter.config.get('base_model_name_or_path')!r}), or the loaded model makes this "
        f"tensor from others: then merge the adapter into its base first (merge_and_unload, save_pretrained) and merge that model."
    )


def _check_task(adapter: Checkpoint, base: Checkpoint) -> None:
    """Refuse a classifier's adapter on a model that is not a classifier."""
    task = str(adapter.config.get("task_type"))
    if task in _TASKS and _TASKS[task] not in _kind(base):
        raise MergeError(
            f"{adapter.name} is a classifier's adapter (task_type={task!r}), but {base.name} is {_kind(base)}, which has no "
            f"head for that; without its head, the adapter is not what was trained. {_other_head(f'AutoModelFor{_TASKS[task]}')}"
        )


def _other_head(how: str) -> str:
    return (
        f"Load its base with {how} and the adapter on it, merge_and_unload, save_pretrained, and merge models made that way; "
        f"or give such a model as base=."
    )


def _kind(base: Checkpoint) -> str:
    return ", ".join(map(str, base.config.get("architectures") or ["a model of an unnamed class"]))


def check_announced(adapter: Checkpoint, others: Iterable[str], base: Checkpoint | None = None) -> None:
    """Refuse an adapter whose file lacks modules that its configuration says are saved.

    Args:
        adapter: The adapter.
        others: Names of its tensors that are not part of a product.
        base: The full model, or None. Names without a module in the base are ignored.

    Raises:
        MergeError: With the modules.
    """
    inside = [set(n.split(".")) for n in others]
    announced = list(adapter.config.get("modules_to_save") or ())
    lost = [m for m in announced if not any(set(m.split(".")) <= i for i in inside)]
    if base is not None:
        there = [set(n.split(".")) for n in (*base.tensors, *((HEAD,) if _is_tied(base) else ()))]
        lost = [m for m in lost if any(set(m.split(".")) <= t for t in there)]
    elif any(len(i & set(_CLASSIFIERS)) for i in inside):
        lost = [m for m in lost if m not in _CLASSIFIERS]
    if lost:
        raise MergeError(
            f"{adapter.name}: {ADAPTER_CONFIG} says modules_to_save={announced!r}, but its file has no tensors for "
            f"{some(lost)}. It is incomplete. Save it again."
        )


def _is_module_of_its_own(name: str, adapter: Checkpoint) -> bool:
    inside = f".{name}"
    return any(f".{module}." in inside for module in adapter.config.get("modules_to_save") or ())


def _is_tied(base: Checkpoint) -> bool:
    return head_name(base) is None and bool(base.config.get("tie_word_embeddings", True))


def _tied_with(target: str, base: Checkpoint) -> list[str]:
    """The other name of a matrix that is both embedding and head."""
    embedding = embedding_name(base)
    if not _is_tied(base) or embedding is None:
        return []
    return [embedding] if target not in base.tensors else [HEAD] if target == embedding else []


def _loaded_name(name: str, modules: Iterable[str], base: Checkpoint) -> str:
    """The loaded model's name of a tensor, if the base's files omit the prefix of the inner model."""
    if name not in base.tensors:
        return name
    for module in modules:
        first, _, rest = module.partition(".")
        if f"{module}.weight" not in base.tensors and f"{rest}.weight" in base.tensors:
            return f"{first}.{name}"
    return name


def _base_tensor(base: Checkpoint, target: str) -> StoredTensor | None:
    return base.tensors.get(target) or base.tensors.get(embedding_name(base) or "")


def base_shape(base: Checkpoint, target: str) -> tuple[int, ...] | None:
    """The shape of a tensor in the base; for a head that is not stored, the embedding's."""
    found = _base_tensor(base, target)
    return None if found is None else found.shape


def _check_shape(target: str, tensor: StoredTensor, base: Checkpoint, adapter: Checkpoint) -> None:
    """Refuse shapes that differ from the base's, except in the number of vocabulary rows."""
    shape = base_shape(base, target)
    vocabulary = is_head(target) or target == embedding_name(base)
    if shape is None or shape == tensor.shape or (vocabulary and shape[1:] == tensor.shape[1:]):
        return
    raise MergeError(
        f"{adapter.name} has {target!r} as {list(tensor.shape)}, but it is {list(shape)} in {base.name}. Give the base that "
        f"it was trained on ({adapter.config.get('base_model_name_or_path')!r})."
    )


def _check_rows(saved: Mapping[str, StoredTensor], base: Checkpoint, adapter: Checkpoint) -> None:
    """Refuse a vocabulary whose length differs from the base's in only one of embedding and head."""
    embedding, head = embedding_name(base), head_name(base) or HEAD
    if embedding is None or (head not in base.tensors and not _is_tied(base)):
        return
    own = {n: (base_shape(base, n) or (0,))[0] for n in (embedding, head)}
    rows = {n: saved[n].shape[0] if n in saved else own[n] for n in own}
    # Mllama's embedding has rows that its head does not have.
    if len({rows[n] - own[n] for n in own}) > 1:
        lacks = next(n for n in rows if n not in saved)
        brings = embedding if lacks == head else head
        raise MergeError(
            f"{adapter.name} has {brings!r} with {rows[brings]} rows but no {lacks!r}, of which {base.name} has {rows[lacks]}: "
            f"it was trained on a base of another vocabulary. Give that base, resized as it was (resize_token_embeddings, "
            f"save_pretrained), or save the adapter again with save_embedding_layers=True."
        )


def _same(base: StoredTensor | None, stored: StoredTensor) -> bool:
    """Whether an adapter's copy of a weight is the base's, in the adapter's dtype."""
    if base is None or base.shape != stored.shape:
        return False
    with Files() as files:
        kind = DTYPES[stored.dtype]
        return all(torch.equal(one.to(kind), two) for one, two in pieces_of([base, stored], files))
