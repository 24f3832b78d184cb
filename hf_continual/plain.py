"""Plain data: what JSON and YAML hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any


def as_plain(data: Any, other: Callable[[Any], Any] = repr) -> Any:
    """Convert data to dictionaries, lists, strings, numbers, booleans and None.

    Args:
        data: Any data; keys become strings, other sequences become lists.
        other: Converts any other value.

    Returns:
        The same as plain data.
    """
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if isinstance(data, Mapping):
        return {str(key): as_plain(value, other) for key, value in data.items()}
    if isinstance(data, Sequence) and not isinstance(data, bytes):
        return [as_plain(value, other) for value in data]
    return other(data)


def is_plain(data: Any) -> bool:
    """Whether a round trip through JSON returns the same data."""
    if isinstance(data, dict):
        return all(isinstance(key, str) and is_plain(value) for key, value in data.items())
    if isinstance(data, list):
        return all(is_plain(value) for value in data)
    return data is None or isinstance(data, bool | int | float | str)


def hyper_parameters(cls: type) -> list[str]:
    """Names of a class's constructor arguments: fields of a dataclass, or parameters of another class."""
    if is_dataclass(cls):
        return [f.name for f in fields(cls) if f.init]
    if cls.__init__ is object.__init__:
        return []
    taken = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return [p.name for p in taken if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
