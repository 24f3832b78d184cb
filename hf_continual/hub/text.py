"""A card as metadata and body; which parts are the author's; values that may be printed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from hf_continual.hub.card_yaml import dump_metadata, load_metadata

KEEP, KEEP_END = "<!-- hf_continual:keep -->", "<!-- /hf_continual:keep -->"
GENERATED = "<!-- written by hf_continual"
PLACEHOLDER = re.compile(
    r"more information needed|\[needs? more information\]|TODO:?\s|\{\{\s*\w+.*?\}\}", re.IGNORECASE
)
TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}\b|hf_oauth_[A-Za-z0-9_.-]{16,}")
PATH = re.compile(
    r"(?<![\w/.:])(?:/(?:home|root|tmp|Users|mnt|data|work|scratch|var|opt|private|workspace|content|kaggle)/[^\s)\"'`|]+|[A-Za-z]:\\[^\s)\"'`|]+|~/[^\s)\"'`|]+|file://\S+)"
)
_SECRET = re.compile(r"(^|_)(token|password|secret|api_key|apikey|credentials?)$", re.IGNORECASE)
_BLOCK = re.compile(rf"{re.escape(KEEP)}\n?(.*?)\n?(?:{re.escape(KEEP_END)}|{re.escape(KEEP)})", re.DOTALL)


def read_card(text: str) -> tuple[dict[str, Any], str]:
    """Metadata and body of a card.

    Args:
        text: The card.

    Returns:
        Both; no metadata is an empty mapping.

    Raises:
        ValueError: If the metadata is not a mapping, or cannot be read.
    """
    text = text.replace("\r\n", "\n")
    if not text.startswith("---\n"):
        return {}, text
    head, found, body = text[4:].partition("\n---")
    if not found:
        raise ValueError("the metadata begins with '---' but does not end with it")
    data = load_metadata(head)
    if data is None:
        return {}, body.lstrip("\n")
    if not isinstance(data, dict):
        raise ValueError(f"the metadata must be a mapping, but is {type(data).__name__}")
    return data, body.lstrip("\n")


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """Like `read_card`; metadata that cannot be read is empty."""
    try:
        return read_card(text)
    except ValueError:
        return {}, text


def is_generated(text: str) -> bool:
    """Whether a card was written by this library."""
    return GENERATED in text


def kept_text(text: str | None) -> str:
    """The author's text in a card.

    Args:
        text: A card, or None.

    Returns:
        The text between the markers; the whole body of a card written by hand; nothing of another tool's draft
        with placeholders.
    """
    if not text:
        return ""
    if is_generated(text) or KEEP in text:
        return "\n\n".join(found.strip() for found in _BLOCK.findall(text) if found.strip())
    body = split_card(text)[1].strip()
    return "" if PLACEHOLDER.search(body) or _is_draft(text) else body


def _is_draft(text: str) -> bool:
    """Whether another trainer generated a card, so that nothing in it is the author's."""
    data = split_card(text)[0]
    said = ("generated_from_trainer", "licence")
    return any(word in (data.get("tags") or []) or word in data for word in said) or "## Quick start" in text


def foreign_metadata(text: str | None, own: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata that the author added to a card; nothing of another tool's draft.

    Args:
        text: A card, or None.
        own: Metadata of the new card, whose keys win.

    Returns:
        The other keys.
    """
    if not text or (not is_generated(text) and not kept_text(text)):
        return {}
    return {k: v for k, v in split_card(text)[0].items() if k not in own and k not in NEVER_KEPT}


def merged_author(mine: str, theirs: str, recorded: str | None) -> str:
    """Combine the author's parts of two cards into one card to keep them from.

    If both were edited since the last push, both texts are kept, the repository's first.

    Args:
        mine: The card in the folder.
        theirs: The card in the repository.
        recorded: The author's text at the last push, or None.

    Returns:
        A card with the author's text and the metadata of both.
    """
    here, there = kept_text(mine), kept_text(theirs)
    if not there or here == there or there == recorded:
        kept = here
    elif not here or here == recorded or here in there:
        kept = there
    else:
        kept = here if there in here else f"{there}\n\n{here}"
    data = {**foreign_metadata(theirs, {}), **foreign_metadata(mine, {})}
    data = {k: v for k, v in data.items() if k not in OWN_KEYS}
    head = dump_metadata(data) if data else "{}\n"
    return f"---\n{head}---\n{GENERATED} -->\n{KEEP}\n{kept}\n{KEEP_END}\n"


# Keys that are computed; an old card's values of them are not the author's text.
OWN_KEYS = ("pipeline_tag", "datasets", "tags", "metrics")

# Keys that this library owns: if a fact became unknown, the old value must not remain.
NEVER_KEPT = (
    "base_model",
    "base_model_relation",
    "library_name",
    "model-index",
    "license",
    "license_name",
    "license_link",
)


def safe(data: Any) -> Any:
    """Plain data that may be published: no local paths, no tokens.

    Args:
        data: Plain data.

    Returns:
        The same, with paths reduced to their last part and token-like entries left out.
    """
    if isinstance(data, Mapping):
        return {
            str(k): safe(v)
            for k, v in data.items()
            if not (_SECRET.search(str(k)) and isinstance(v, str) and k not in _WORDS)
        }
    if isinstance(data, Sequence) and not isinstance(data, str | bytes):
        return [safe(v) for v in data]
    if isinstance(data, str):
        if TOKEN.search(data):
            return TOKEN.sub("...", data)
        if _local(data):
            return PurePath(data.replace("\\", "/")).name
        return PATH.sub(lambda found: PurePath(found[0].replace("\\", "/")).name, data)
    return data


# Tokens of a vocabulary, not of an account.
_WORDS = ("eos_token", "pad_token", "bos_token", "unk_token", "sep_token", "cls_token", "mask_token")


def _local(text: str) -> bool:
    return "\n" not in text and " " not in text and (text.startswith(("/", "~/", "./", "../")) or text[1:3] == ":\\")
