"""Reading a model's structure from the names of its tensors: blocks, embedding, head. No model is built."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from hf_continual.merging.errors import MergeError, some
from hf_continual.merging.inputs.checkpoint import Checkpoint

EMBED, FINAL = "embed", "final"
_INDEX = re.compile(r"(?:^|\.)(\d+)\.")
HEAD = "lm_head.weight"  # the name of a head that no file stores
# Head modules, wherever a model with a language model has them, and modules that are heads only at the top level.
_HEAD = re.compile(
    r"(?:(?:.*\.)?(?:lm_head|embed_out|lm_head\.decoder|lm_head\.out_proj)|output|output_projection|proj_out|head)"
    r"\.(?:weight|bias)"
)
_EMBEDDING = re.compile(
    r"(?:.*\.)?(?:embed_tokens|wte|word_embeddings?|tok_embeddings|tokens_embed|embed_in|shared|embeddings)\.weight"
)
_TOWERS = ("vision", "visual", "audio", "image")
TEXT_PARTS = (
    "text_config",
    "llm_config",
    "language_config",
)  # where a configuration of several models holds the text model's
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def text_parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The text model's configurations inside a configuration of several models."""
    return [part for key in TEXT_PARTS if isinstance(part := config.get(key), Mapping)]


def number_of_blocks(config: Mapping[str, Any]) -> int | None:
    """Blocks of the text model, by its configuration."""
    for part in (*text_parts(config), config):
        for key in _LAYERS:
            if isinstance(part.get(key), int):
                return part[key]
    return None


def block_prefix(names: Iterable[str], config: Mapping[str, Any]) -> str | None:
    """The prefix of a block's number, such as ``"model.layers."``.

    It is the family ``PREFIX<number>.`` with as many members as the configuration has blocks; of several (a vision
    tower of the same depth), the one with most tensors outside a tower.
    """
    families: dict[str, set[int]] = {}
    size: dict[str, int] = {}
    for name in names:
        if found := _INDEX.search(name):
            prefix = name[: found.start(1)]
            families.setdefault(prefix, set()).add(int(found[1]))
            size[prefix] = size.get(prefix, 0) + 1
    wanted = number_of_blocks(config)
    fitting = [p for p, numbers in families.items() if numbers == set(range(wanted or 0)) and wanted]
    return max(fitting, key=lambda p: (not any(t in p for t in _TOWERS), size[p]), default=None)


def groups_of(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """The group of each tensor: ``embed``, ``layer.0`` ..., ``final``.

    Everything under a block belongs to it; norm and head after the last block are ``final``; token and position
    embeddings, and everything else before the first block, are ``embed``.

    Args:
        names: The tensors' names.
        config: The model's configuration.

    Returns:
        Name of a tensor -> its group.

    Raises:
        MergeError: If the blocks cannot be found.
    """
    names = list(names)
    prefix = block_prefix(names, config)
    if prefix is None:
        raise MergeError(
            f"No list of {number_of_blocks(config)} blocks was found among {some(names)}. Set the weights yourself with "
            f"weights={{'default': [...]}}, one number per model."
        )
    groups = {}
    for name in names:
        if name.startswith(prefix):
            groups[name] = f"layer.{name[len(prefix) :].partition('.')[0]}"
        else:
            module = name.rpartition(".")[0].rpartition(".")[2]
            before = ("emb" in name and not is_head(name)) or module in ("wte", "wpe", "project_in")
            groups[name] = EMBED if before else FINAL
    return groups


def ordered(groups: Iterable[str]) -> list[str]:
    """Each group once, from the input upwards."""
    place = {EMBED: -1, FINAL: 1 << 30}
    return sorted(set(groups), key=lambda g: place.get(g, int(g.rpartition(".")[2]) if g.startswith("layer.") else 0))


def is_head(name: str) -> bool:
    """Whether a tensor is the weight or the bias of a language-model head."""
    return _HEAD.fullmatch(name) is not None


def find_embedding(names: Iterable[str]) -> str | None:
    """Name of the token embedding among tensors, or None if it is not known."""
    found = [n for n in names if _EMBEDDING.fullmatch(n) and not any(t in n for t in _TOWERS)]
    # Blocks that predict further tokens may have their own.
    return min(found, key=lambda n: bool(_INDEX.search(n)), default=None)


def embedding_name(model: Checkpoint) -> str | None:
    """Name of the token embedding of a model, or None if it is not known."""
    return find_embedding(model.tensors)


def head_name(model: Checkpoint) -> str | None:
    """Name of the stored language-model head, or None."""
    return next((n for n in model.tensors if n.endswith(".weight") and is_head(n)), None)
