"""`hf-continual gate`. It has its own exit codes, so that a pipeline can tell a worse model from a wrong command."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

PASS, ERROR, REGRESSION, USAGE, INSUFFICIENT = 0, 1, 2, 3, 4


class GateCommand(TyperCommand):
    """The command, with exit code 3 for what was typed wrong."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Read the command line."""
        try:
            return super().make_context(*args, **kwargs)
        except Exception as error:
            # typer carries its own copy of click, so that its errors are known by this attribute.
            if getattr(error, "exit_code", 0) == 2:
                error.exit_code = USAGE  # pyrefly: ignore[missing-attribute]
            raise


def exit_code_of(error: Exception) -> int:
    """The gate's exit code of an error: 3 for a path or a file of thresholds that cannot be used, 1 for any other."""
    from hf_continual.stream.plan_lines import PlanError

    return USAGE if isinstance(error, PlanError | FileNotFoundError) else ERROR


def gate(
    run: Annotated[str, typer.Argument(help="Folder of a finished run of a plan.")],
    against: Annotated[str, typer.Option(help="Folder of another run, or a YAML file of thresholds.")],
    margin: Annotated[
        float | None, typer.Option(min=0, help="Against a run: drop that is allowed. By default 0.02, 2 points.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(min=0, max=1, help="Chance of a false alarm over all checks. By default 0.05.")
    ] = None,
    power: Annotated[
        float | None, typer.Option(min=0, max=1, help="Chance of passing that the rows needed are for. By default 0.8.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the reason only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict and every check as JSON.")] = False,
) -> None:
    """Decide whether a run is good enough, from its stored predictions.

    Exit code 0: pass. 2: regression. 4: insufficient evidence, the rows cannot tell. 3: wrong usage. 1: an error.

    Example: hf-continual gate out/new --against out/released --margin 0.02
    """
    from hf_continual.stream.gate import gate as hold

    found = hold(run, against, margin, alpha, power)
    if as_json:
        sys.stdout.write(json.dumps(found.to_dict(), indent=1) + "\n")
    else:
        from rich.console import Console

        console = Console(highlight=False)
        if not quiet:
            from hf_continual.stream.gate_report import checks_table

            console.print(checks_table(found.checks))
        console.print(found.reason, soft_wrap=True, markup=False)
    raise typer.Exit(found.exit_code)
