"""`hf-continual train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def train(
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a model, or of an adapter to start from.")
    ] = None,
    train: Annotated[str | None, typer.Option(help="Rows to learn: a file, a saved dataset, a Hub id.")] = None,
    test: Annotated[str | None, typer.Option(help="Rows to score the model with, before and after.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "--output", help="Output folder. By default out.")] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Methods against forgetting: a name, or YAML: '{replay: {rows: old.jsonl, ratio: 0.1}}'."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A file with fields of ContinualConfig, such as a recipe; also model, train, test, peft."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A training argument, KEY=VALUE, such as learning_rate=1e-4.")
    ] = None,
    peft: Annotated[
        str | None, typer.Option(help="Fields of LoraConfig: '{r: 16, target_modules: all-linear}'.")
    ] = None,
    from_adapter: Annotated[
        str | None, typer.Option(help="What to do with an adapter given as --model: continue, stack or merge_then_new.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    metric: Annotated[str | None, typer.Option(help="How --test is scored; by default exact_match.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the order, new adapters and dropout.")] = None,
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
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars and no log.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and the log on stderr.")] = False,
) -> None:
    """Train a model on one set of rows, without a plan; resumes where it was interrupted."""
    from hf_continual.stream.train_command import train_from_command

    if config is not None:
        sys.path.append(str(config.absolute().parent))  # your own method may be in its folder
    given = {
        "model": model, "train": train, "test": test, "out": None if out is None else str(out), "methods": methods,
        "peft": peft, "from_adapter": from_adapter, "steps": steps, "metric": metric, "seed": seed,
    }  # fmt: skip
    train_from_command(
        config, {k: v for k, v in given.items() if v is not None}, set_ or (), dry_run=dry_run, quiet=quiet, as_json=as_json,
        hourly_price=hourly_price,
    )  # fmt: skip
