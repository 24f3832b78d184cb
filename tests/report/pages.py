"""Reading a page as a browser's parser does, without a browser."""

from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "br", "input", "img", "link", "base", "embed", "source"}


class Page(HTMLParser):
    """Tags, attributes, texts and tables of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.tables: dict[str, list[list[tuple[str, str | None]]]] = {}
        self.headings: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.source = file.read_text(encoding="utf-8")
        self._caption, self._cell = "", None
        self.feed(self.source)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "figcaption":
            self._caption = ""
        if tag == "thead":
            self.headings[self._caption] = []
            self.tables[self._caption] = []
        if tag == "tr" and "tbody" in self.open:
            self.tables[self._caption].append([])
        if tag in ("td", "th") and "tbody" in self.open:
            self._cell = ["", dict(attrs).get("data-v")]

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> where {self.open[-3:]} are open"
        self.open.pop()
        if tag in ("td", "th") and self._cell is not None:
            self.tables[self._caption][-1].append(tuple(self._cell))
            self._cell = None

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            self.scripts.append(data)
        elif inside == "style":
            self.styles.append(data)
        else:
            self.texts.append(data)
        if inside == "figcaption":
            self._caption += data
        if inside == "button" and "thead" in self.open:
            self.headings[self._caption].append(data)
        if self._cell is not None:
            self._cell[0] += data

    @property
    def text(self) -> str:
        """All that is read."""
        return "\n".join(self.texts)

    def numbers(self, caption: str) -> list[list[float | None]]:
        """What a table is sorted by, row by row, without its first column."""
        return [[None if v is None else float(v) for _, v in row[1:]] for row in self.tables[caption]]


def calls(page: Page) -> list[tuple[str, str, str]]:
    """Attributes with which a page could ask a server for something, or run something."""
    found = []
    for tag, name, value in page.attributes:
        local = value.startswith(("#", "data:image/png;base64,"))
        if name.startswith("on") or name in ("srcdoc", "action", "formaction", "ping", "background", "poster", "data"):
            found.append((tag, name, value))
        elif name in ("src", "href", "xlink:href", "srcset") and not local:
            found.append((tag, name, value))
        elif "://" in value or ("url(" in value and "url(#" not in value):
            found.append((tag, name, value)) if name not in ("data-task", "aria-label", "title", "value") else None
    return found
