"""Run every cell of the families table and write `recipes/families.md`: ``python -m tests.families.table``."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import datasets

from tests.families.cells import CELLS, run
from tests.families.configs import ENCODERS, KINDS, TOWERS
from tests.families.notes import notes

PAGE = Path(__file__).parents[2] / "recipes" / "families.md"
HEAD = """# Families of models and methods

Each cell is a tiny random model of the family that was trained for two steps on a CPU with the method, by
`python -m tests.families.table`; the names are the model types of transformers. "yes" says:

- **Replay**: rows are mixed in, their tokens are counted and their loss is logged.
- **GeRe**: the compared states are the ones that the head reads, and no unit is outside its interval before the first step.
- **FreezeLayers**: exactly the lowest block and everything between the token ids and it is frozen, and every other
  weight has the gradient that it has without the method. With LoRA, no adapter lies below and those above are trained.
- **RecAdam**, **KIF**: the weights move, and each round of KIF has the loss of its memory.

Models with a vision or audio tower are trained on text alone here. Whether their towers are trainable does not change; the
log says how many of the trained weights only rows with images or sound can reach.

"""


def rows(cells: dict[tuple[str, str], str]) -> list[str]:
    """The table in Markdown, one line per family, and its notes."""
    texts = list(dict.fromkeys(note for kind in KINDS for note in notes(kind)))
    lines = [f"| family | {' | '.join(CELLS)} | notes |", "|---" * (len(CELLS) + 2) + "|"]
    for kind in KINDS:
        tower = " (tower)" if kind in TOWERS else " (encoder)" if kind in ENCODERS else ""
        marks = ", ".join(str(texts.index(note) + 1) for note in notes(kind))
        lines.append(f"| {kind}{tower} | {' | '.join(cells[kind, method] for method in CELLS)} | {marks} |")
    return [*lines, "", *(f"{i}. {text[0].upper()}{text[1:]}." for i, text in enumerate(texts, start=1))]


def main() -> None:
    """Run all cells; a cell that fails stops the table."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    cells = {}
    for kind in KINDS:
        for method in CELLS:
            cells[kind, method] = run(kind, method)
        sys.stderr.write(f"{kind}: {', '.join(cells[kind, method] for method in CELLS)}\n")
    PAGE.write_text(HEAD + "\n".join(rows(cells)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
