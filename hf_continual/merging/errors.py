"""Errors of merging checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MergeError(RuntimeError):
    """Checkpoints that cannot be merged, or a merge that cannot continue.

    The message names the model, the tensor or setting, the values found, and what to do.
    """


def some(names: list[str] | set[str], most: int = 5) -> str:
    """Up to five names for a message, in order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


@contextmanager
def as_merge_error() -> Iterator[None]:
    """Turn the ValueError of a damaged file into a MergeError with the same message."""
    try:
        yield
    except ValueError as error:
        raise MergeError(str(error)) from error
