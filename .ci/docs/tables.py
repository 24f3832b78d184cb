"""Tables of Markdown files: read, and looked up by the name of a method."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Table(NamedTuple):
    """A table: its head and its rows, as lines, and the heading that it stands under."""

    heading: str
    head: str
    rows: list[str]


def tables(file: str) -> list[Table]:
    """The tables of a file of the repository, in order."""
    found: list[Table] = []
    heading, lines = "", (ROOT / file).read_text(encoding="utf-8").splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif re.fullmatch(r"[|\s:-]*\|-[|\s:-]*", line):
            found.append(Table(heading, before, []))
        elif line.startswith("|") and found and before.startswith("|"):
            found[-1].rows.append(line)
    return found


def first_cell(row: str) -> str:
    """What stands in the first column of a row."""
    return row.strip("| ").split("|")[0].strip()


def as_markdown(head: str, rows: list[str]) -> str:
    """A table with some of the rows of another."""
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *rows])


def section(text: str, title: str) -> str | None:
    """The text below a heading of the second level, or None if there is no such heading."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.S | re.M)
    return found and found.group(1).strip()
