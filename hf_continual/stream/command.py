"""`hf-continual run`: train_stream with a log, tables and a picture."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import datasets
from rich.console import Console
from rich.logging import RichHandler
from transformers.utils import logging as hf_logging

from hf_continual.plots import plot_matrix
from hf_continual.stream.dry_run import describe
from hf_continual.stream.prepare import prepare
from hf_continual.stream.read import read_plan
from hf_continual.stream.report import dry_run_report, results_report
from hf_continual.stream.results import RESULTS
from hf_continual.stream.run import check_merge
from hf_continual.stream.sweep import prepare_sweep
from hf_continual.stream.train import train_stream


def run_plan(plan: Path, dry_run: bool = False, only: str | None = None, quiet: bool = False, **changes: Any) -> None:
    """Run a plan, or say what it would do.

    Args:
        plan: A YAML file.
        dry_run: Whether to stop before any weights are loaded.
        only: One run of a sweep.
        quiet: Whether to show tables only.
        **changes: Fields that replace the plan's.
    """
    console = Console()
    # Said at every start by libraries below this one, about names of their own.
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing.*` is deprecated", FutureWarning)
    datasets.disable_progress_bars()
    hf_logging.disable_progress_bar()
    # Not accelerate's state: it would be set up here without what the plan says of devices.
    main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    logging.getLogger("hf_continual").setLevel(logging.WARNING if quiet or not main else logging.INFO)
    if dry_run:
        read, where = read_plan(plan, **changes)
        check_merge(read, where)
        if read.sweep is None:
            described = [("", describe(prepare(read, where)))]
        else:
            described = [(m.name, describe(p)) for m, p in prepare_sweep(read, where, only)]
        if main:
            console.print(dry_run_report(described))
        return
    if quiet:
        changes["sft"] = {**read_plan(plan, **changes)[0].sft, "disable_tqdm": True, "logging_strategy": "no"}
    result = train_stream(plan, only=only, **changes)
    if main:
        console.print(results_report(result.results))
        if "matrix" in result.results:
            found = result.results
            figure = plot_matrix(
                found["matrix"]["scores"], found["tasks"], found["matrix"]["base"], found["metric"] or "",
                found["matrix"]["lower_is_better"],
            )  # fmt: skip
            figure.savefig(result.output_dir / "matrix.png", dpi=150)
        console.print(f"all numbers  {result.output_dir / RESULTS}", soft_wrap=True, highlight=False)
