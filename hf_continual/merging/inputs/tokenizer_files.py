"""The tokenizer and chat templates in a folder, and which folder's tokenizer belongs to a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

from hf_continual.atomic_files import read_object
from hf_continual.merging.errors import as_merge_error
from hf_continual.merging.inputs.members import Member
from hf_continual.merging.inputs.structure import embedding_name

TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
PROCESSOR_TEMPLATE = "chat_template.json"  # where processors kept their template in older versions
# A folder with one of these has its tokens. vocab.json counts only together with merges.txt, or as the list of characters
# of a CTC model.
_VOCABULARIES = (
    "tokenizer.json", "*.model", "*.tiktoken", "*.spm", "vocab.txt", "bpe.codes", "tekken.json", "byte_maps.json",
    "prophetnet.tokenizer",
)  # fmt: skip
_BESIDE = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "dict.txt", "emoji.json",
    "entity_vocab.json", "normalizer.json",
)  # fmt: skip
WHOLE, UNCONFIGURED, ALONE, NONE = 3, 2, 1, 0


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The files of a folder's tokenizer, without chat templates, by name."""
    return {
        p.name: p
        for p in sorted(folder.iterdir())
        if p.is_file() and any(fnmatch(p.name, pattern) for pattern in (*_VOCABULARIES, *_BESIDE))
    }


def completeness(folder: Path) -> int:
    """How much of a tokenizer a folder holds.

    Args:
        folder: The folder.

    Returns:
        `WHOLE`, `UNCONFIGURED` (tokens without a configuration, or characters), `ALONE` (a configuration, which is
        a whole tokenizer only if the tokens are bytes), or `NONE`.
    """
    names = tokenizer_files(folder).keys()
    configured = TOKENIZER_CONFIG in names
    known = any(fnmatch(n, p) for n in names for p in _VOCABULARIES) or {"vocab.json", "merges.txt"} <= names
    if known:
        return WHOLE if configured else UNCONFIGURED
    if configured:
        return UNCONFIGURED if "vocab.json" in names else ALONE
    return NONE


def places(member: Member) -> list[Path]:
    """The folders of a model: an adapter's own comes before its base's."""
    return list(dict.fromkeys((member.own.folder, member.checkpoint.folder)))


def embedding_rows(member: Member) -> int | None:
    """Rows of a model's token embedding, or None if it is not known."""
    name = embedding_name(member.checkpoint)
    view = member.view(name) if name is not None else None
    return None if view is None or not view.source.shape else view.source.shape[0]


def fits(folder: Path, rows: int | None) -> bool:
    """Whether every token of a folder's tokenizer has a row, as far as this is known."""
    last = extent(folder)[1]
    return rows is None or last is None or last < rows


def tokenizer_folder(member: Member) -> Path:
    """The folder of a model's tokenizer: the adapter's if it has a whole one for its embedding, else the base's."""
    own, rows = member.own.folder, embedding_rows(member)
    base = member.checkpoint.folder
    # Tokens without a configuration count as an adapter's own only if there are more of them than the base has.
    more = completeness(own) == UNCONFIGURED and (extent(own)[0] or 0) > (extent(base)[0] or 0)
    if fits(own, rows) and (completeness(own) == WHOLE or more):
        return own
    return max((base, own), key=lambda p: (completeness(p) > NONE and fits(p, rows), completeness(p)))


def vocabulary(folder: Path) -> dict[int, str] | None:
    """The token of each id.

    Args:
        folder: The folder.

    Returns:
        Id -> token, or None if the folder does not list them as JSON or text.
    """
    with as_merge_error():
        found = _listed(folder)
        if found is None or (folder / "tokenizer.json").is_file():
            return found
        decoder = tokenizer_config(folder).get("added_tokens_decoder") or {}
        file = folder / "added_tokens.json"
        added = {i: t for t, i in read_object(file).items() if isinstance(i, int)} if file.is_file() else {}
        return {int(i): t.get("content") for i, t in decoder.items()} | added | found


def _listed(folder: Path) -> dict[int, str] | None:
    if (file := folder / "tokenizer.json").is_file():
        data = read_object(file)
        vocab = (data.get("model") or {}).get("vocab") or {}
        entries = (
            enumerate(entry[0] for entry in vocab) if isinstance(vocab, list) else ((i, t) for t, i in vocab.items())
        )
        return dict(entries) | {added["id"]: added["content"] for added in data.get("added_tokens") or []}
    if (file := folder / "vocab.txt").is_file():
        return dict(enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines()))
    if (file := folder / "vocab.json").is_file():
        return {i: t for t, i in read_object(file).items() if isinstance(i, int)}
    return None


def extent(folder: Path) -> tuple[int | None, int | None]:
    """How many tokens a folder's tokenizer has, and the last id; None where that is unknown."""
    names = ("tokenizer.json", "vocab.txt", "vocab.json", "added_tokens.json")
    stats = [(folder / n).stat() if (folder / n).is_file() else None for n in names]
    return _extent(folder, tuple(s and (s.st_mtime_ns, s.st_size) for s in stats))


@lru_cache(maxsize=64)
def _extent(folder: Path, _: tuple[tuple[int, int] | None, ...]) -> tuple[int | None, int | None]:
    """Like `extent`; a large vocabulary is read once for as long as its files do not change."""
    found = vocabulary(folder)
    return (None, None) if not found else (len(found), max(found))


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json`` of a folder; empty if there is none."""
    file = folder / TOKENIZER_CONFIG
    with as_merge_error():
        return read_object(file) if file.is_file() else {}


def eos_id(folder: Path, tokenizer: Path) -> int | None:
    """The id of the token that a folder names as the end of a text.

    Args:
        folder: The folder; it need not hold a whole tokenizer.
        tokenizer: The folder that has the tokens.

    Returns:
        The id, or None if it is unknown.
    """
    config, special = tokenizer_config(folder), folder / "special_tokens_map.json"
    with as_merge_error():
        named = config.get("eos_token") or (read_object(special).get("eos_token") if special.is_file() else None)
    token = named.get("content") if isinstance(named, dict) else named
    if token is None:
        return None
    listed = vocabulary(tokenizer) or {}
    decoder = tokenizer_config(tokenizer)
    added = {int(i): t.get("content") for i, t in (decoder.get("added_tokens_decoder") or {}).items()}
    return next((i for i, t in (listed | added).items() if t == token), None)


def templates(folder: Path) -> dict[str, Path | str]:
    """The chat templates of a folder as separate files: what transformers loads from it, wherever it is written.

    Args:
        folder: The folder.

    Returns:
        Name in an output -> file, or the text if it is part of a configuration.
    """
    found: dict[str, Path | str] = {}
    if (folder / TEMPLATE).is_file():
        found[TEMPLATE] = folder / TEMPLATE
    more = sorted((folder / TEMPLATES).glob("*.jinja")) if (folder / TEMPLATES).is_dir() else []
    found |= {f"{TEMPLATES}/{p.name}": p for p in more}
    legacy = folder / PROCESSOR_TEMPLATE
    with as_merge_error():
        inside = [read_object(f) for n in (PROCESSOR_TEMPLATE, "processor_config.json") if (f := folder / n).is_file()]
    # Separate files take precedence over a configuration.
    for config in () if found else (tokenizer_config(folder), *inside):
        for name, text in _named(config).items():
            found.setdefault(TEMPLATE if name == "default" else f"{TEMPLATES}/{name}.jinja", text)
    if legacy.is_file():
        found[PROCESSOR_TEMPLATE] = legacy
    return found


def _named(config: Mapping[str, Any]) -> dict[str, str]:
    told = config.get("chat_template")
    if isinstance(told, str):
        return {"default": told} if told else {}
    if isinstance(told, list):
        return {t["name"]: t["template"] for t in told}
    return dict(told) if isinstance(told, dict) else {}


def texts(files: Mapping[str, Path | str]) -> str:
    """The text of templates, for comparison."""
    said = {n: f if isinstance(f, str) else f.read_text(encoding="utf-8") for n, f in files.items()}
    said = {n: t for n, t in said.items() if n != PROCESSOR_TEMPLATE or len(said) == 1}
    return json.dumps(said, sort_keys=True)
