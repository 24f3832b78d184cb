"""`hf-continual run`: train_stream with a log, tables and a plot.

The plan is read before anything heavy is imported, so that a mistake in it is reported within a second.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.logging import RichHandler

from hf_continual.progress import be_quiet
from hf_continual.stream.plan import Plan
from hf_continual.stream.plan_lines import Where
from hf_continual.stream.read_plan import read_plan
from hf_continual.stream.recommend import Rule, facts_of, recommended

if TYPE_CHECKING:
    from hf_continual.stream.prepared import Prepared


def run_plan(
    plan: Path, dry_run: bool = False, only: str | None = None, quiet: bool = False, as_json: bool = False,
    overrides: Sequence[str] = (), hourly_price: float | None = None,
) -> None:  # fmt: skip
    """Run a plan, or show what it would do.

    Args:
        plan: A YAML file.
        dry_run: Whether to stop before any weights are loaded.
        only: One run of a sweep.
        quiet: Whether to show tables only.
        as_json: Whether to print the numbers as JSON to standard output, and everything else to standard error.
        overrides: Entries that override the plan's, as ``KEY=VALUE``.
        hourly_price: Price of an hour of this machine, for the dry run's estimate.
    """
    read, where = read_plan(plan, overrides)
    console = set_up(quiet, as_json, bars=not quiet)
    if dry_run:
        described = estimated(_ready(read, where, only), hourly_price)
        if is_main():
            show_dry_run(described, console, as_json, recommended(facts_of(read)[0]))
        return
    from hf_continual.stream.stored_run import RESULTS
    from hf_continual.stream.train import run_read

    if quiet:
        quiet_options = {"disable_tqdm": True, "logging_strategy": "no"}
        read = read.model_copy(update={"sft": {**read.sft, **quiet_options}})
    with kept_for_json(as_json):
        result = run_read(read, where, only)
    if not is_main():
        return
    if "matrix" in result.results:
        _picture(result.results, result.output_dir / "matrix.png")
    if as_json:
        sys.stdout.write(json.dumps(result.results, indent=1) + "\n")
        return
    from hf_continual.stream.report import results_report

    console.print(results_report(result.results))
    console.print(f"all numbers  {result.output_dir / RESULTS}", soft_wrap=True, highlight=False)


def plan_of(plan: Path, overrides: Sequence[str] = (), only: str | None = None) -> str:
    """A plan with its overrides as YAML; of a sweep one run.

    Args:
        plan: A YAML file.
        overrides: Entries that override the plan's, as ``KEY=VALUE``.
        only: One run of a sweep.

    Returns:
        The text.
    """
    from hf_continual.stream.printed_plan import plan_text

    return plan_text(*read_plan(plan, overrides), only)


def is_main() -> bool:
    """Whether this is the process that prints.

    Does not use accelerate's state, which would be initialised here without the plan's device settings.
    """
    return os.environ.get("RANK", "0") == "0"


def kept_for_json(as_json: bool) -> AbstractContextManager[Any]:
    """Send to standard error what libraries print, such as the trainer's log, while standard output is kept for JSON."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


def set_up(quiet: bool, as_json: bool, bars: bool = True) -> Console:
    """Silence libraries' messages at every start, and send the log to a console.

    Args:
        quiet: Whether only warnings are logged.
        as_json: Whether the standard output is kept for JSON.
        bars: Whether long work shows a progress bar.

    Returns:
        The console.
    """
    import datasets
    from transformers.utils import logging as hf_logging

    console = Console(stderr=as_json)
    if not bars:
        be_quiet()
    # Dependencies say this at every start, about their own names.
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing.*` is deprecated", FutureWarning)
    # bitsandbytes, which PEFT imports, announces at import that one of its kernels is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    hf_logging.disable_progress_bar()
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    logging.getLogger("hf_continual").setLevel(logging.WARNING if quiet or not is_main() else logging.INFO)
    return console


def _ready(read: Plan, where: Where, only: str | None) -> list[tuple[str, Prepared]]:
    from hf_continual.stream.prepare import prepare
    from hf_continual.stream.run_plan import check_merge
    from hf_continual.stream.sweep import prepare_sweep

    check_merge(read, where)
    if read.sweep is None:
        return [("", prepare(read, where))]
    return [(member.name, prepared) for member, prepared in prepare_sweep(read, where, only)]


def estimated(ready: Sequence[tuple[str, Prepared]], hourly_price: float | None) -> list[tuple[str, dict[str, Any]]]:
    """Describe what runs will do and cost, with the time estimated by a short probe on this machine.

    Args:
        ready: The runs by name.
        hourly_price: Price of an hour of this machine, or None.

    Returns:
        Description of each run by its name.
    """
    from hf_continual.stream.dry_run import describe
    from hf_continual.stream.preview import previews
    from hf_continual.stream.probe import estimate

    found = []
    for name, prepared in ready:
        described = describe(prepared)
        described["time"] = estimate(prepared, described, hourly_price)
        described["previews"] = previews(prepared)
        found.append((name, described))
    return found


def show_dry_run(
    described: Sequence[tuple[str, dict[str, Any]]], console: Console, as_json: bool, methods: Sequence[Rule] = ()
) -> None:
    """Print what runs would do, and which methods are recommended, as tables or as JSON."""
    names = [rule.name for rule in methods]
    if as_json:
        found = {
            "runs": [{"name": name, **run} for name, run in described],
            **({"recommended": names} if names else {}),
        }
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return
    from hf_continual.stream.cost_report import dry_run_report

    console.print(dry_run_report(described))
    if names:
        console.print(
            f"methods for such a plan: {', '.join(names)} (hf-continual recommend PLAN says why)", soft_wrap=True
        )


def _picture(results: dict[str, Any], file: Path) -> None:
    from hf_continual.plots import plot_matrix
    from hf_continual.stream.report import matrix_rows

    matrix, rows = results["matrix"], matrix_rows(results)
    figure = plot_matrix(
        [row for _, row in rows], results["tasks"], matrix["base"], results["metric"] or "", matrix["lower_is_better"],
        [name for name, _ in rows],
    )  # fmt: skip
    figure.savefig(file, dpi=150)
