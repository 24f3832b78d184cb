"""Checks of hyper-parameters, with messages that name the method, the option and the value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def one_of(owner: str, key: str, value: Any, known: Sequence[Any]) -> None:
    """Refuse a value that is not among the known ones."""
    if not any(value is k or (isinstance(k, str) and value == k) for k in known):
        raise ValueError(f"{owner}({key}={value!r}) must be one of {', '.join(map(str, known))}.")


def number(owner: str, key: str, value: Any) -> None:
    """Refuse a value that is not an int or a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{owner}({key}={value!r}) must be a number, got {type(value).__name__}.")


def whole_number(owner: str, key: str, value: Any, least: int = 1, unit: str = "") -> None:
    """Refuse a value that is not an int, or is below `least`; the unit says what it counts."""
    unit = f" ({unit})" if unit else ""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}({key}={value!r}) must be a whole number{unit}, got {type(value).__name__}.")
    if value < least:
        raise ValueError(f"{owner}({key}={value}) must be at least {least}{unit}.")


def between(owner: str, key: str, value: Any, low: float, high: float, closed: str = "", note: str = "") -> None:
    """Refuse a value that is not a number between two bounds.

    Args:
        owner: The class or function.
        key: The option.
        value: Its value.
        low: Lower end.
        high: Upper end.
        closed: Which ends are allowed: ``"["`` the lower, ``"]"`` the upper, ``"[]"`` both.
        note: A sentence on what the value means.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is out of range.
    """
    number(owner, key, value)
    if not (low < value < high or ("[" in closed and value == low) or ("]" in closed and value == high)):
        raise ValueError(f"{owner}({key}={value!r}) must {_range(low, high, closed)}.{note and ' ' + note}")


def _range(low: float, high: float, closed: str) -> str:
    if high == float("inf"):
        return f"be {'at least' if '[' in closed else 'above'} {low:g}"
    out = {"": ", both excluded", "[": f", {high:g} excluded", "]": f", {low:g} excluded"}
    return f"lie between {low:g} and {high:g}{out.get(closed, '')}"


def at_least(owner: str, key: str, value: Any, least: float) -> None:
    """Refuse a value that is not a finite number of at least `least`."""
    number(owner, key, value)
    if not least <= value < float("inf"):
        raise ValueError(f"{owner}({key}={value!r}) must be a finite number of at least {least:g}.")


# Files of a task's folder, and prefixes of the log, that do not belong to a method.
RESERVED = ("complete", "eval", "memory", "methods", "published", "run", "scores", "task", "test", "train", "trained")


def plain_name(method: str, name: Any) -> None:
    """Refuse a name that would make a method's log, rows or files be mistaken for something else."""
    plain = isinstance(name, str) and name and not set(name) & set("/\\\0\n") and not name.startswith(".")
    if not plain:
        raise ValueError(f"{method}(name={name!r}): a name is a word without '/', because files are named after it.")
    if name.lower() in RESERVED:
        raise ValueError(
            f"{method}(name={name!r}): the library's own files and logs use this name ({', '.join(RESERVED)}). Choose another."
        )
