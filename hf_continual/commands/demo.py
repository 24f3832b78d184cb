"""`hf-continual demo`."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer


def demo(
    model: Annotated[str | None, typer.Option(help="Folder or Hub id of a causal language model.")] = None,
    out: Annotated[Path, typer.Option(help="Output folder; an interrupted demo resumes in it.")] = Path("demo-out"),
    seed: Annotated[int, typer.Option(help="Seed of the invented people, the order and the adapters.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each task.")] = 45,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over if the folder holds a run.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress and no tables, only where the results are.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, and the rest on stderr.")] = False,
) -> None:
    """See forgetting, and see it prevented: three tasks in a row, with and without methods, on a real model."""
    from rich.console import Console

    from hf_continual.paths import cannot_hold, check_is_there

    if model is not None:
        check_is_there(model, "--model")
    if problem := cannot_hold(out):
        raise ValueError(f"--out {out}: {problem}. Name another folder.")
    # bitsandbytes, which PEFT imports, announces at import that one of its kernels is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    from hf_continual.demo.run import main as run_demo

    console = Console(stderr=as_json, quiet=quiet)
    results = run_demo(model=model, out=out, seed=seed, fresh=fresh, console=console, steps=steps)
    if as_json:
        sys.stdout.write(json.dumps(results, indent=1) + "\n")
    elif quiet:
        sys.stdout.write(f"{out / 'results.json'}\n")
