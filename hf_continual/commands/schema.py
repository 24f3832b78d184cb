"""`hf-continual schema`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def schema(
    out: Annotated[Path | None, typer.Option(help="Write it to this file.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="With --out, print nothing.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print it as JSON: it is JSON without this option too.")
    ] = False,
) -> None:
    """Print the JSON schema of plans, with which an editor completes and checks them."""
    from hf_continual.atomic_files import write_text
    from hf_continual.stream.plan_schema import plan_schema

    text = json.dumps(plan_schema(), indent=1) + "\n"
    if out is None or as_json:
        sys.stdout.write(text)
    if out is not None:
        write_text(out, text)
        if not (quiet or as_json):
            typer.echo(
                f"{out} is written. As the first line of a plan, for editors: # yaml-language-server: $schema={out}"
            )
