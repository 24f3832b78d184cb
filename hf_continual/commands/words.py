"""Errors in the words of the command line: the library says ``overwrite=True``, a user types ``--overwrite``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

_TRUE = re.compile(r"(?<![\w.(])(\w+)=True\b")
_VALUE = re.compile(r"(?<![\w.({\[,-])(\w+)=(?=[\s.,;)]|$)")


def flags_of(command: Any, arguments: Sequence[str]) -> set[str]:
    """The options of the verb that was typed.

    Args:
        command: The click group.
        arguments: What was typed after the name of the program.

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
    """Write the arguments of Python that an error names as the options that the verb has.

    Args:
        message: What the library said, such as ``"... or say overwrite=True."``
        flags: Long options of the verb, without dashes.

    Returns:
        The message, such as ``"... or say --overwrite."``
    """
    known = {flag.replace("-", "_"): f"--{flag}" for flag in flags}

    def spelled(match: re.Match[str]) -> str:
        return known.get(match.group(1), match.group(0))

    return _VALUE.sub(spelled, _TRUE.sub(spelled, message))
