"""Look things up by name: suggest the nearest known name for a typo, and import ``"package.module:attribute"``."""

from __future__ import annotations

import difflib
import importlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any


def nearest(name: Any, known: Iterable[str]) -> str | None:
    """The known name that was probably intended, or None."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return close[0] if close else None


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """A sentence suggesting the name that was probably intended, with a leading space; empty if none is close."""
    close = nearest(name, known)
    return f" Did you mean {close!r}?" if close else ""


def imported(target: str) -> Any:
    """Import the object that ``"package.module:attribute"`` names.

    Args:
        target: The name.

    Returns:
        The attribute.

    Raises:
        ImportError: If there is no such module or attribute, or no attribute is named.
    """
    module, _, attribute = target.partition(":")
    if not attribute:
        raise ImportError(f"{target!r} does not name an attribute, as 'package.module:attribute' does")
    try:
        return getattr(importlib.import_module(module), attribute)
    except AttributeError as error:
        raise ImportError(str(error)) from error


def former_place(old: str, new: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module whose contents have moved, so that scripts that import from it still work.

    Args:
        old: The module.
        new: Where its names are now.

    Returns:
        A function that looks a name up in the new place, with a DeprecationWarning.
    """

    def look_up(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        warnings.warn(f"{old} is now {new}: import from there.", DeprecationWarning, stacklevel=2)
        return imported(f"{new}:{name}")

    return look_up
