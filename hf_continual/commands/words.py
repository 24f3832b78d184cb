"""Errors in command-line terms: the library writes ``overwrite=True``, a user types ``--overwrite``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

_TRUE = re.compile(r"(?<![\w.(])(\w+)=True\b")
_VALUE = re.compile(r"(?<![\w.({\[,-])(\w+)=(?=[\s.,;)]|$)")


def flags_of(command: Any, arguments: Sequence[str]) -> set[str]:
    """Options of the subcommand that was typed.

    Args:
        command: The click group.
        arguments: What was typed after the program's name.

    Returns:
        Long options, without the dashes.
    """
    for word in arguments:
        if word.startswith("-"):
            continue
        if (found := getattr(command, "commands", {}).get(word)) is None:
            break
        command = found
    return {o[2:] for p in getattr(command, "params", ()) for o in (*p.opts, *p.secondary_opts) if o.startswith("--")}


def in_flags(message: str, flags: Iterable[str]) -> str:
    """Rewrite the Python arguments that an error names as options of the subcommand.

    Args:
        message: The library's message, such as ``"... or say overwrite=True."``
        flags: Long options of the subcommand, without dashes.

    Returns:
        The message, such as ``"... or say --overwrite."``
    """
    known = {flag.replace("-", "_"): f"--{flag}" for flag in flags}

    def spelled(match: re.Match[str]) -> str:
        return known.get(match.group(1), match.group(0))

    return _VALUE.sub(spelled, _TRUE.sub(spelled, message))
