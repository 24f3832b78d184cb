"""`hf-continual run`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def run(
    plan: Annotated[Path, typer.Argument(help="The plan, a YAML file.")],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Override an entry of the plan, KEY=VALUE: model, data, output, steps, or a path: tasks.law.train.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show what would be done and what it costs; load no weights, unless a method measures rows.",
        ),
    ] = False,
    hourly_price: Annotated[
        float | None, typer.Option(min=0, help="Price of an hour of this machine, for the dry run's estimate.")
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Output folder, overriding the plan's.")] = None,
    only: Annotated[str | None, typer.Option(help="Run only this run of the plan's sweep, by name.")] = None,
    print_plan: Annotated[
        bool,
        typer.Option("--print-plan", help="Print the plan as YAML, of a sweep the run named by --only; run nothing."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars and no log, only the tables.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON, and the log on stderr.")] = False,
) -> None:
    """Learn the tasks of a plan one after the other and measure retention; resumes where it was interrupted."""
    from hf_continual.stream.command import plan_of, run_plan

    sys.path.append(str(plan.absolute().parent))  # your own method may be in the plan's folder
    overrides = [*(set_ or ()), *([f"output_dir={json.dumps(str(output_dir))}"] if output_dir else ())]
    if print_plan:
        sys.stdout.write(plan_of(plan, overrides, only))
        return
    run_plan(
        plan, dry_run=dry_run, only=only, quiet=quiet, as_json=as_json, overrides=overrides, hourly_price=hourly_price
    )
