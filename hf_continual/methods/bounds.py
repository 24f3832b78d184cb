"""Checks of hyper-parameters, with the sentence that names the method, the option and the value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def one_of(owner: str, key: str, value: Any, known: Sequence[str]) -> None:
    """Refuse a word that is not among the known ones."""
    if value not in known:
        raise ValueError(f"{owner}({key}={value!r}) must be one of {', '.join(known)}.")


def whole_number(owner: str, key: str, value: Any, least: int = 1) -> None:
    """Refuse what is no int, or below `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}({key}={value!r}) must be a whole number, got {type(value).__name__}.")
    if value < least:
        raise ValueError(f"{owner}({key}={value}) must be at least {least}.")


def between(owner: str, key: str, value: Any, low: float, high: float, closed: bool = False) -> None:
    """Refuse what is no number strictly between two, or not the upper one where that is allowed."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{owner}({key}={value!r}) must be a number, got {type(value).__name__}.")
    if not (low < value < high or (closed and value == high)):
        raise ValueError(f"{owner}({key}={value!r}) must lie between {low:g} and {high:g}.")


def at_least(owner: str, key: str, value: Any, least: float) -> None:
    """Refuse what is not a finite number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{owner}({key}={value!r}) must be a number, got {type(value).__name__}.")
    if not least <= value < float("inf"):
        raise ValueError(f"{owner}({key}={value!r}) must be a finite number of at least {least}.")


# Files of a task's folder, and prefixes of the log, that are not a method's.
RESERVED = ("complete", "eval", "memory", "methods", "published", "run", "scores", "task", "test", "train", "trained")


def plain_name(method: str, name: Any) -> None:
    """Refuse a name under which a method's log, rows or files would be taken for something else."""
    plain = isinstance(name, str) and name and not set(name) & set("/\\\0\n") and not name.startswith(".")
    if not plain:
        raise ValueError(f"{method}(name={name!r}): a name is a word without '/', as it is the name of files.")
    if name.lower() in RESERVED:
        raise ValueError(
            f"{method}(name={name!r}): this name is taken by the library's own files and logs ({', '.join(RESERVED)}). Choose another."
        )
