"""A progress bar over bytes with the time left, on the standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


@contextmanager
def bytes_bar(total: int, title: str, shown: bool | None) -> Iterator[Callable[[int], None]]:
    """Show the progress of reading and writing.

    Args:
        total: Bytes to read and write.
        title: What is being done.
        shown: Whether to show it; None: if the standard error is a terminal.

    Yields:
        A function to call with the number of bytes done.
    """
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda _: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.advance(task, done)
