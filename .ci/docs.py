"""`make docs`: the API reference in build/docs, and a check that it holds every public name.

The package imports its names when they are asked for, and pdoc documents those that are there: they are asked for first.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pdoc

import hf_continual


def main(target: Path) -> None:
    """Write the reference, and fail if a public name is missing in it."""
    for name in hf_continual.__all__:
        getattr(hf_continual, name)
    pdoc.pdoc("hf_continual", output_directory=target)
    page = (target / "hf_continual.html").read_text(encoding="utf-8")
    if missing := [name for name in hf_continual.__all__ if f'id="{name}"' not in page]:
        sys.exit(f"{target} lacks {', '.join(missing)}.")
    sys.stdout.write(f"{len(hf_continual.__all__)} names in {target / 'index.html'}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs"))
