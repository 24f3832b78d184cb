"""The page of the command line, from the Typer app."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from hf_continual.cli import app
from hf_continual.merging.command import command_for
from hf_continual.merging.method_options import options_of
from hf_continual.merging.methods.table import MERGES


def command_page() -> str:
    """Every verb with its arguments and options."""
    parts = [
        "# Command line",
        "",
        "`hf-continual VERB --help` prints the same. Every verb takes `--json` (one document on standard output, everything else on standard "
        "error) and `--quiet`. `hf-continual --install-completion` completes verbs and options in bash, zsh, fish and PowerShell.",
    ]
    root = get_command(app)
    for name, command in verbs(root, "hf-continual"):
        parts += ["", *described(name, command)]
    return "\n".join(parts) + "\n"


def verbs(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """All subcommands, also those of subcommands, with their whole names."""
    for word, below in getattr(command, "commands", {}).items():
        if getattr(below, "commands", None):
            yield from verbs(below, f"{name} {word}")
        else:
            yield f"{name} {word}", below


def described(name: str, command: Any) -> list[str]:
    """One subcommand: usage, text, parameters, example."""
    if name.endswith(" merge"):  # it takes its options from the method that is named
        command = command_for(None, {})
    arguments = [p.name.upper() for p in command.params if p.param_type_name == "argument"]
    said = (command.help or "").replace("\b", "").strip()
    lines = [f"## {name.removeprefix('hf-continual ')}", "", f"`{' '.join([name, *arguments, '[OPTIONS]'])}`", "", said]
    shown = [p for p in command.params if getattr(p, "help", None) and not getattr(p, "hidden", False)]
    if shown:
        lines += ["", "| option | |", "|---|---|", *(parameter(p) for p in shown)]
    if command.epilog:
        lines += ["", "```", command.epilog.rpartition("Example: ")[2], "```"]
    return lines + (merge_options() if name.endswith(" merge") else [])


def parameter(one: Any) -> str:
    """An argument or an option as a row of a table."""
    names = ", ".join([*one.opts, *one.secondary_opts]) if one.param_type_name == "option" else one.name.upper()
    default = one.default
    given = (
        f" Default: `{default}`." if isinstance(default, int | float | str) and default not in (False, True, "") else ""
    )
    text = " ".join(str(getattr(one, "help", "")).split())
    return f"| `{names}` | {escaped(text)}{escaped(given)} |"


def escaped(text: str) -> str:
    """Text that may stand in a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def merge_options() -> list[str]:
    """The options of each way of merging."""
    lines = ["", "Options of each method:", "", "| method | option | |", "|---|---|---|"]
    for name in MERGES:
        for option in options_of(name).values():
            flag = f"--{option.name.replace('_', '-')}"
            lines.append(f"| `{name}` | `{flag}` | {escaped(' '.join(option.help.split()).replace('``', '`'))} |")
    return lines
