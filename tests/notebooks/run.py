"""``python -m tests.notebooks.run [NAME ...]`` runs notebooks and stores what they show."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run(path: Path) -> Any:
    """The notebook after a run from top to bottom, without times and counters of this run."""
    os.environ |= {"PYTHONWARNINGS": "ignore", "PYDEVD_DISABLE_FILE_VALIDATION": "1", "DS_ACCELERATOR": "cpu"}
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    for number, cell in enumerate((c for c in book.cells if c.cell_type == "code"), 1):
        cell.metadata.pop("execution", None)
        cell.execution_count = number
        cell.outputs = [
            out for out in cell.outputs if out.get("name") != "stderr"
        ]  # what libraries say of this machine
        for out in cell.outputs:
            if "execution_count" in out:
                out["execution_count"] = number
    book.metadata["language_info"] = {"name": "python"}
    return book


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for path in NOTEBOOKS:
        if not sys.argv[1:] or path.stem in sys.argv[1:]:
            nbformat.write(run(path), path)
            sys.stdout.write(f"{path.name}\n")
