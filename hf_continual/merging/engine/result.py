"""The result of a merge, for the caller, for a report and for a model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_continual.paper import Paper


@dataclass(frozen=True)
class MergeResult:
    """The outcome of a merge. `report` holds the facts a model card needs; it names no local folders.

    Args:
        output_dir: Where the result is.
        method: Name of the method, such as ``"linear"``.
        paper: What to cite.
        kind: ``"model"`` or ``"adapter"``.
        rank: Highest rank of an adapter output, else None.
        report: What ``merge_report.json`` holds: models, options, weights, files with checksums, warnings.
        bytes_read: Bytes of weights that were read.
        bytes_written: Bytes of weights that were written.
        seconds: Wall time by stage.
        url: Page of the commit, if it was pushed.
    """

    output_dir: Path
    method: str
    paper: Paper
    kind: str
    rank: int | None
    report: Mapping[str, Any]
    bytes_read: int
    bytes_written: int
    seconds: Mapping[str, float]
    url: str | None = None
