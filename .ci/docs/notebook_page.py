"""A notebook as a page: its text, its code, and the outputs of its last run."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def as_markdown(file: str) -> str:
    """The page of a notebook.

    Args:
        file: Path from the root of the repository.

    Returns:
        Markdown, with links as in the notebook.
    """
    cells = json.loads((ROOT / file).read_text(encoding="utf-8"))["cells"]
    parts = []
    for place, cell in enumerate(cells):
        source = "".join(cell["source"]).rstrip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code":
            parts.append(f"```python\n{source}\n```")
            parts += [_output(file, place, number, out) for number, out in enumerate(cell["outputs"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def pictures(file: str) -> dict[str, bytes]:
    """The pictures among a notebook's outputs, by their place on the site."""
    cells = json.loads((ROOT / file).read_text(encoding="utf-8"))["cells"]
    return {
        _picture(file, place, number): base64.b64decode("".join(out["data"]["image/png"]))
        for place, cell in enumerate(cells)
        for number, out in enumerate(cell.get("outputs", []))
        if "image/png" in out.get("data", {})
    }


def _picture(file: str, place: int, number: int) -> str:
    return f"notebooks/{Path(file).stem}-{place}-{number}.png"


def _output(file: str, place: int, number: int, out: dict[str, Any]) -> str:
    data = out.get("data", {})
    if "image/png" in data:
        return f"![output]({Path(_picture(file, place, number)).name}){{ .output }}"
    said = COLOURS.sub("", "".join(out.get("text", data.get("text/plain", "")))).rstrip()
    return f"```text\n{said}\n```" if said else ""
