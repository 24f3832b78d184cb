"""The images that a card shows, and which of them are in its folder and pushed with it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from hf_continual.hub.text import split_card

KINDS = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")
_SHOWN = re.compile(
    r"!\[(?:[^\]\\]|\\.)*\]\(\s*(?:<([^>\n]+)>|([^)\s]+))[^)]*\)"  # ![words](picture "title")
    r"|<(?:img|source)\b[^>]*?\bsrc(?:set)?\s*=\s*(?:\"([^\"]+)\"|'([^']+)'|([^\s\"'>]+))",
    re.IGNORECASE,
)
_NAMED = re.compile(r"!\[([^\]]*)\](?:\[([^\]]*)\])?(?!\()")  # ![words][name]
_NAME = re.compile(r"^ {0,3}\[([^\]]+)\]:\s*(?:<([^>\n]+)>|(\S+))", re.MULTILINE)
_LINK = re.compile(r"\]\(\s*(?:<([^>\n]+)>|([^)\s]+))[^)]*\)|\bhref\s*=\s*[\"']([^\"']+)[\"']")
_CODE = re.compile(r"^ {0,3}(```|~~~).*?^ {0,3}\1|`[^`\n]*`|<!--.*?-->", re.DOTALL | re.MULTILINE)
_WIDTH = re.compile(r"\s+[\d.]+[wx](?:,\s*|$)")
_ELSEWHERE = re.compile(r"^(?:[a-z][a-z0-9+.-]*:|//|#)", re.IGNORECASE)


def shown(body: str) -> list[str]:
    """The images that a text shows, as written, without those on other servers.

    Args:
        body: A card without its metadata.

    Returns:
        Each once, in order.
    """
    text = _CODE.sub("", body)
    names = {found[1].strip().lower(): found[2] or found[3] for found in _NAME.finditer(text)}
    found = []
    for match in _SHOWN.finditer(text):
        # A srcset lists several with their widths.
        found += [part for part in _WIDTH.split(next(filter(None, match.groups()))) if part]
    for match in _NAMED.finditer(text):
        if (target := names.get((match[2] or match[1]).strip().lower())) is not None:
            found.append(target)
    return list(dict.fromkeys(target for target in found if not _ELSEWHERE.match(target)))


def place(target: str) -> str | None:
    """Where in the folder a relative link points.

    Args:
        target: The link as written.

    Returns:
        A path in the folder, or None if it points outside.
    """
    name = os.path.normpath(unquote(re.split(r"[?#]", target)[0]))
    return None if os.path.isabs(name) or name.split(os.sep)[0] in ("..", ".") else name.replace(os.sep, "/")


def problem(target: str, folder: Path) -> str | None:
    """Why readers will not see an image of a card, or None.

    Args:
        target: The link as written.
        folder: The card's folder.

    Returns:
        A sentence with what to do.
    """
    name = place(target)
    if name is None:
        return f"the image {target} is outside the folder and is not pushed. Copy it into the folder and link it there."
    if not (folder / name).is_file() and not (folder / target).is_file():
        return f"the image {target} is not in the folder. Create it, or remove it from the card."
    if not _goes(folder, name):
        return (
            f"the image {target} is in the folder but is not pushed: only {', '.join(KINDS)} are, in folders that "
            f"are not hidden. Save it as one of these, or remove it from the card."
        )
    return None


def linked_pictures(folder: Path, readme: str = "README.md") -> dict[str, Path]:
    """The images of a folder that its card shows, links to, or names in its metadata.

    Args:
        folder: The folder.
        readme: Name of the card.

    Returns:
        Path in the folder -> file.
    """
    card = folder / readme
    if not card.is_file():
        return {}
    metadata, body = split_card(card.read_text(encoding="utf-8", errors="replace"))
    links = [next(filter(None, match.groups())) for match in _LINK.finditer(_CODE.sub("", body))]
    named = [t for t in (*shown(body), *links, *_words(metadata)) if not _ELSEWHERE.match(t)]
    places = [name for target in named if (name := place(target)) is not None]
    return {name: folder / name for name in dict.fromkeys(places) if _goes(folder, name) and (folder / name).is_file()}


def _goes(folder: Path, name: str) -> bool:
    """Whether a file is of a kind that is pushed, and not in a hidden folder or behind a link to another folder."""
    inside = (folder / name).parent.resolve().is_relative_to(folder.resolve())
    return inside and name.lower().endswith(KINDS) and not any(part.startswith(".") for part in name.split("/"))


def _words(data: Any) -> Iterator[str]:
    if isinstance(data, str) and data.lower().endswith(KINDS):
        yield data
    elif isinstance(data, dict | list):
        for value in data.values() if isinstance(data, dict) else data:
            yield from _words(value)
