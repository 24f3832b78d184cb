"""The command line: `hf-continual`, or `python -m hf_continual`.

Each subcommand is a file of `hf_continual.commands` (merge, push and card are next to the code they call). None of them
imports torch before it needs it.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

import hf_continual
from hf_continual import stopping
from hf_continual.commands.chat import chat
from hf_continual.commands.demo import demo
from hf_continual.commands.diagnose import diagnose
from hf_continual.commands.examples import example
from hf_continual.commands.gate import GateCommand, exit_code_of, gate
from hf_continual.commands.methods import methods
from hf_continual.commands.recommend import recommend
from hf_continual.commands.report import report
from hf_continual.commands.run import run
from hf_continual.commands.schema import schema
from hf_continual.commands.score import score
from hf_continual.commands.skill import skill
from hf_continual.commands.train import train
from hf_continual.commands.words import flags_of, in_flags
from hf_continual.hub.command import PUSH_FAILED, card, push
from hf_continual.hub.errors import HubPushError
from hf_continual.merging.command import merge

app = typer.Typer(
    name="hf-continual",
    help="Fine-tune a language model again and again without losing what it knows.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
for verb in (train, run, score, chat, methods):
    app.command(epilog=example(verb.__name__))(verb)
# Its options depend on the method, so it parses its arguments itself, including --help.
app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(merge)
app.command(cls=GateCommand, epilog=example("gate"))(gate)
for verb in (recommend, diagnose, report, push, demo, schema, skill):
    app.command(epilog=example(verb.__name__))(verb)
app.add_typer(card, name="card")
DEBUG = {"on": False}


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


def _said(error: Exception) -> str:
    """The message of an error; if another library raised it, also where it came from."""
    if isinstance(error, ValueError | TypeError | OSError | RuntimeError | ImportError) and str(error):
        return in_flags(str(error), flags_of(typer.main.get_command(app), sys.argv[1:]))
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (in {Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{error}{place}. This error is unexpected; hf-continual --debug ... shows where it happened."


def _exit_code(error: Exception) -> int:
    """Of an error that ends the program."""
    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    if verb == "gate":
        return exit_code_of(error)
    return PUSH_FAILED if isinstance(error, HubPushError) else 2


def _warned(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Format this library's warnings as one sentence, other warnings with their place, as Python shows them."""
    if issubclass(category, UserWarning) and Path(filename).is_relative_to(Path(__file__).parent):
        return f"Warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _leave_processes() -> None:
    """End the process group, which joins its threads: an exit while they run may abort."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main() -> None:
    """Run the command line.

    Exit code 0: done. 2: an error, printed as one message. 3: a push that failed. 75: stopped by SIGTERM, SIGINT or SIGUSR1
    or a time limit; the same command resumes. `gate` has its own codes.
    """
    warnings.formatwarning = _warned
    # As with `python -m`: your own methods and metrics are found in the current folder.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with stopping.listening("The same command resumes."):
            app()
    except SystemExit as ended:
        if ended.code in (None, 0, stopping.EXIT_CODE):  # all processes of the run get here
            _leave_processes()
        raise
    except Exception as error:
        if DEBUG["on"]:
            raise
        Console(stderr=True).print(
            Text.assemble((type(error).__name__, "bold red"), f": {_said(error)}"), highlight=False, soft_wrap=True
        )
        sys.exit(_exit_code(error))
    finally:
        # The system frees a process's memory at exit; collecting cycles among torch's objects first would take 0.4 s.
        gc.freeze()
