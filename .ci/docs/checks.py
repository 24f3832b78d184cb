"""What a built site must hold: every public name, and nothing that a browser would fetch from elsewhere."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

DOTTED = re.compile(r"`(hf_continual(?:\.[A-Za-z_]\w*)+)(?:\(\))?`")
OUTSIDE = re.compile(r"^\s*(?:https?:)?//", re.I)
STYLE = re.compile(r"(?:url\(|@import)\s*[\"']?\s*(?:https?:)?//[^)\"'\s]*", re.I)
LOADED = {"src", "srcset", "data", "poster", "background"}
REL = {"stylesheet", "preload", "prefetch", "preconnect", "dns-prefetch", "icon", "modulepreload", "manifest"}


class Requests(HTMLParser):
    """Collects the addresses that a browser fetches to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what an element loads."""
        given = {name: value or "" for name, value in attrs}
        self.ids.add(given.get("id", ""))
        loaded = [value for name, value in given.items() if name in LOADED]
        if tag == "link" and set(given.get("rel", "").lower().split()) & REL:
            loaded.append(given.get("href", ""))
        self.found += [value for value in loaded if OUTSIDE.match(value)]
        self.found += STYLE.findall(given.get("style", ""))


def read(page: str) -> Requests:
    """A page, parsed."""
    parser = Requests()
    parser.feed(page)
    return parser


def outside(site: Path) -> Iterator[str]:
    """Each request to another server that the pages and style sheets of a site would make."""
    for file in sorted(site.rglob("*")):
        if file.suffix == ".html":
            text = file.read_text(encoding="utf-8")
            styles = "".join(re.findall(r"<style.*?</style>", text, re.S))
            found = [*read(text).found, *STYLE.findall(styles)]
        elif file.suffix == ".css":
            found = STYLE.findall(file.read_text(encoding="utf-8"))
        else:
            continue
        yield from (f"{file.relative_to(site)}: {address}" for address in found)


def missing(site: Path, paths: dict[str, str]) -> list[str]:
    """Public names whose definition has no place on the site.

    Args:
        site: Folder of the built site.
        paths: Name -> path of its definition.

    Returns:
        The names.
    """
    ids: set[str] = set()
    for file in [*site.glob("reference.html"), *site.glob("methods/*.html")]:
        ids |= read(file.read_text(encoding="utf-8")).ids
    return [name for name, path in paths.items() if path not in ids]


def unresolved(text: str) -> list[str]:
    """Dotted names of the library in a page's inline code that are not there."""
    return sorted({name for name in DOTTED.findall(text) if not _exists(name)})


def _exists(name: str) -> bool:
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False
