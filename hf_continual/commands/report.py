"""`hf-continual report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Folders of runs, or files with their results; several are shown side by side."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The page: one HTML file that needs no server.")] = Path("report.html"),
    figures: Annotated[
        Path | None, typer.Option(help="Folder for the pictures as PNG and SVG. By default next to the page.")
    ] = None,
    no_figures: Annotated[bool, typer.Option("--no-figures", help="Write the page alone.")] = False,
    predictions: Annotated[
        int, typer.Option(min=0, help="Changed answers of each run that are shown with their text.")
    ] = 100,
    leaderboard: Annotated[
        bool,
        typer.Option("--leaderboard", help="Rank the runs, those with the same model, tasks and scoring together."),
    ] = False,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the page shows as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Show what runs learned, kept and lost, as one page."""
    from hf_continual.report.command import report_from_command

    if figures is None and not no_figures:
        figures = out.with_name(f"{out.stem}_figures")
    report_from_command(
        folders,
        out,
        figures=None if no_figures else figures,
        predictions=predictions,
        title=title,
        as_json=as_json,
        quiet=quiet,
        leaderboard=leaderboard,
    )
