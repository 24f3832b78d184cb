"""Result files read, and tables of them put into a README; for every recipe whose tables are written from its files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- results: written by render.py -->\n", "<!-- end of results -->"
Results = Sequence[dict[str, Any]]


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All result files of a folder, by name."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]


def shown(values: Sequence[float | None], factor: float, digits: int) -> str:
    """Mean and range of a figure over seeds; a dash if it was not measured."""
    there = [v * factor for v in values if v is not None]
    if not there or len(there) < len(values):
        return "-"
    middle = f"{statistics.fmean(there):.{digits}f}"
    return middle if len(there) == 1 else f"{middle} ({min(there):.{digits}f} to {max(there):.{digits}f})"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def rendered(readme: str, tables: str) -> str:
    """A README with these tables between its markers."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{tables}{END}{after}"
