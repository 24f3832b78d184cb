"""`hf-continual methods`."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer


def methods(
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the names only, one a line.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """List the methods against forgetting, where they act, and their papers."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from hf_continual.methods.compose import hooks
    from hf_continual.methods.table import TABLE, method_class

    if quiet and not as_json:
        sys.stdout.write("\n".join(TABLE) + "\n")
        return
    classes = {name: method_class(name) for name in TABLE}
    if as_json:
        listed = [
            {"name": name, "class": cls.__name__, "acts_on": hooks(cls), "paper": cls.paper and cls.paper.url}
            for name, cls in classes.items()
        ]
        sys.stdout.write(json.dumps(listed, indent=1) + "\n")
        return
    # Names and addresses stay whole in 80 columns; what a method acts on is folded.
    table = Table(title="methods of hf_continual", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("name", "class", "acts on", "paper"):
        table.add_column(column, overflow="fold", no_wrap=column in ("name", "class", "paper"))
    for name, cls in classes.items():
        cited = "" if cls.paper is None else (cls.paper.url or "").removeprefix("https://")
        table.add_row(name, cls.__name__, ", ".join(hooks(cls)), cited)
    Console().print(table)
