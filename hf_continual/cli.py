"""The command line: `hf-continual`, or `python -m hf_continual`."""

from __future__ import annotations

import gc
import json
import logging
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import hf_continual
from hf_continual import stopping
from hf_continual.hub.command import PUSH_FAILED, card, push
from hf_continual.hub.errors import HubPushError
from hf_continual.merging.command import merge

app = typer.Typer(
    name="hf-continual",
    help="Fine-tune a language model again and again without losing what it knows.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(card, name="card")
app.command()(push)
DEBUG = {"on": False}
app.command()(merge)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf_continual {hf_continual.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Fine-tune a language model again and again without losing what it knows."""
    DEBUG["on"] = debug


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="Folder or Hub id of a causal language model.")] = None,
    out: Annotated[Path, typer.Option(help="Output folder; an interrupted demo goes on in it.")] = Path("demo-out"),
    seed: Annotated[int, typer.Option(help="Seed of the invented people, the order and the adapters.")] = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each task.")] = 45,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew if the folder holds a run.")] = False,
) -> None:
    """See forgetting, and see it prevented: three tasks in a row, with and without methods, on a real model."""
    # bitsandbytes, which PEFT imports, announces at import that a kernel of its own is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    from hf_continual.demo.run import main as run_demo

    run_demo(model=model, out=out, seed=seed, fresh=fresh, steps=steps)


@app.command()
def run(
    plan: Annotated[Path, typer.Argument(help="The plan, a YAML file.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what will be done and what it costs; load no weights.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="An entry in place of the plan's, KEY=VALUE: model, data, output, steps, tasks.law.train."),
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Output folder in place of the plan's.")] = None,
    only: Annotated[str | None, typer.Option(help="One run of the plan's sweep, by name.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars and no log, only the tables.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON, the log on stderr.")] = False,
) -> None:
    """Learn the tasks of a plan one after the other and measure what was kept; goes on where it was interrupted."""
    from hf_continual.stream.command import run_plan

    sys.path.append(str(plan.absolute().parent))  # a method of one's own may lie beside the plan
    overrides = [*(set_ or ()), *([f"output_dir={json.dumps(str(output_dir))}"] if output_dir else ())]
    run_plan(plan, dry_run=dry_run, only=only, quiet=quiet, as_json=as_json, overrides=overrides)


@app.command()
def methods() -> None:
    """List the methods against forgetting, where they act, and their papers."""
    from hf_continual.methods.compose import stations
    from hf_continual.methods.table import TABLE, method_class

    table = Table(title="methods of hf_continual", title_justify="left")
    for column in ("name", "class", "acts on", "paper"):
        table.add_column(column, overflow="fold")
    for name in TABLE:
        cls = method_class(name)
        paper = cls.paper
        cited = "" if paper is None else f"{paper.title} ({paper.year}) {paper.url}"
        table.add_row(name, cls.__name__, ", ".join(stations(cls)), cited)
    Console().print(table)


def _said(error: Exception) -> str:
    """The message of an error; of one that this library does not raise itself, also where it came from."""
    if isinstance(error, ValueError | TypeError | OSError | RuntimeError | ImportError) and str(error):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (in {Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{error}{place}. This error was not foreseen; hf-continual --debug ... shows where it happened."


def main() -> None:
    """Run the command line.

    Exit code 0: done. 2: an error, printed as one message. 3: a push that failed. 75: stopped by SIGTERM, SIGINT or SIGUSR1
    or a time limit; the same command resumes.
    """
    try:
        with stopping.listening("The same command resumes."):
            app()
    except Exception as error:
        if DEBUG["on"]:
            raise
        Console(stderr=True).print(
            Text.assemble((type(error).__name__, "bold red"), f": {_said(error)}"), highlight=False, soft_wrap=True
        )
        sys.exit(PUSH_FAILED if isinstance(error, HubPushError) else 2)
    finally:
        # The system frees the memory of a process that ends; looking for cycles among torch's objects first takes 0.4 s.
        gc.freeze()
