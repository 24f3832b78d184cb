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
    leaderboard: bool = False,
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
        leaderboard: Whether to rank the runs, in place of showing each.

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
        said = (lambda text: None) if status is None else status.update
        if leaderboard:
            from hf_continual.report.leaderboard import write_leaderboard

            found = write_leaderboard(folders, out, figures=figures, title=title, said=said)
        else:
            from hf_continual.report.write import write_report

            found = write_report(folders, out, figures=figures, predictions=predictions, title=title, said=said)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    elif not quiet:
        shown = Console()
        many = sum(len(board["arms"]) for board in found["boards"]) if leaderboard else len(found["runs"])
        shown.print(f"{many} {'arms' if leaderboard else 'runs'}  {out}", soft_wrap=True, highlight=False)
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
