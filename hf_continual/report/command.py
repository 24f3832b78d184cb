"""`hf-continual report`, as it talks on a terminal."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console


def report_from_command(
    folders: Sequence[Path],
    out: Path,
    *,
    figures: Path | None,
    predictions: int,
    title: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the report and say where it is.

    Args:
        folders: Folders of runs.
        out: The page.
        figures: Folder for the pictures, or None.
        predictions: Maximum number of changed answers of each run.
        title: Heading of the page.
        as_json: Whether to print what the page shows as JSON.
        quiet: Whether to print nothing.

    Raises:
        ValueError: If the page cannot be written where it is wanted.
    """
    if out.is_dir():
        raise ValueError(f"out={out} is a folder. Name the page itself, such as {out / 'report.html'}.")
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(
            f"out={out} does not end in .html, so that a browser would not show it. Say {out.with_suffix('.html')}."
        )
    status = None if quiet else Console(stderr=True).status("starting")
    with _errors_only(), status or contextlib.nullcontext():
        from hf_continual.report.write import write_report

        found = write_report(
            folders, out, figures=figures, predictions=predictions, title=title,
            said=(lambda text: None) if status is None else status.update,
        )  # fmt: skip
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    elif not quiet:
        shown = Console()
        shown.print(f"{len(found['runs'])} runs  {out}", soft_wrap=True, highlight=False)
        if figures is not None:
            shown.print(f"pictures  {figures} ({len(found['figures'])} files)", soft_wrap=True, highlight=False)
        if found["missing"]:
            shown.print(f"{len(found['missing'])} things are missing; the page says which.", highlight=False)


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """Log no warnings inside: the page reports what does not belong together."""
    logger = logging.getLogger("hf_continual")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
