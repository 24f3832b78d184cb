"""The options of a merge method, read from its dataclass: names, types, help, and how command-line words are parsed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hf_continual.merging.methods.table import merge_class
from hf_continual.option_names import documented


@dataclass(frozen=True)
class MethodOption:
    """A hyper-parameter of a method, as an option.

    Args:
        name: The field's name.
        kinds: What its type allows: classes, and the values of a `Literal`.
        help: Its description in the method's docstring.
        required: Whether it has no default.
        default: The default as shown, or None.
        rows: Whether it takes rows; on the command line these come from a file.
        flags: Command-line flags that stand for one of its values, such as ``--self-calibration`` for ``"self"``.
    """

    name: str
    kinds: frozenset[Any]
    help: str
    required: bool
    default: str | None
    rows: bool
    flags: Mapping[str, Any]

    @property
    def spelling(self) -> str:
        """Its flag, such as ``--num-typical``."""
        return "--" + self.name.replace("_", "-")

    @property
    def spellings(self) -> tuple[str, ...]:
        """All flags that set it; for a boolean, also the negated one."""
        no = "--no-" + self.name.replace("_", "-")
        return (self.spelling, no) if self.type is bool else (self.spelling,)

    @property
    def metavar(self) -> str | None:
        """The allowed values, if they are few."""
        words = sorted(kind for kind in self.kinds if isinstance(kind, str))
        words += ["<float>"] if float in self.kinds else []
        return f"[{'|'.join(words)}]" if self.type is str and set(words) != {"<float>"} and words else None

    @property
    def type(self) -> type:
        """The type that the command line parses: a boolean, a number, or a word for `read`."""
        if bool in self.kinds:
            return bool
        plain = self.kinds - {type(None)}
        return next((kind for kind in (int, float) if plain == {kind}), str)

    def read(self, value: Any) -> Any:
        """Convert a value from the command line or a file to what the method takes.

        Args:
            value: A string, or an already converted value.

        Returns:
            The value.

        Raises:
            ValueError: If a number is required and the string is not one.
        """
        if self.rows and isinstance(value, str | os.PathLike):
            from hf_continual.data.rows import load_rows

            return load_rows(str(value))
        if not isinstance(value, str) or value in self.kinds:
            return value
        if Mapping in self.kinds and value.lstrip().startswith("{"):
            return json.loads(value)
        if tuple in self.kinds and "," in value:
            return tuple(value.split(","))
        if not self.kinds & {int, float, Sequence}:
            return value
        if (found := self._numbers(value)) is not None:
            return found
        if any(kind is str or isinstance(kind, str) for kind in self.kinds):
            return value
        wanted = "numbers separated by commas, such as 0.7,0.3" if Sequence in self.kinds else "a number"
        raise ValueError(f"{self.spelling}={value!r}: give {wanted}.")

    def _numbers(self, word: str) -> Any:
        """The number or list of numbers in a string, or None."""
        if int in self.kinds and re.fullmatch(r"-?\d+", word):
            return int(word)
        if not self.kinds & {float, Sequence}:
            return None
        try:
            found = [float(part) for part in word.split(",")]
        except ValueError:
            return None
        if len(found) == 1 and float in self.kinds:
            return found[0]
        return found if Sequence in self.kinds else None


def options_of(name: str) -> dict[str, MethodOption]:
    """Read the options of a method, by name.

    Args:
        name: A key of the table of merges, or ``"package.module:Class"``.

    Returns:
        The options; the method is imported.
    """
    cls = merge_class(name)
    hints, said = get_type_hints(cls), documented(cls)
    return {
        f.name: MethodOption(
            f.name,
            frozenset(_kinds(hints[f.name])),
            said.get(f.name, ""),
            f.default is MISSING and f.default_factory is MISSING,
            None if f.default in (MISSING, None) else str(f.default),
            bool(f.metadata.get("rows")),
            f.metadata.get("flags", {}),
        )
        for f in fields(cls)
        if f.init
    }


def _kinds(hint: Any) -> list[Any]:
    """Split a type: the classes of a union, the values of a `Literal`."""
    origin = get_origin(hint)
    if origin is Literal:
        return list(get_args(hint))
    if origin is None or (isinstance(origin, type) and origin.__module__ not in ("types", "typing")):
        return [origin or hint]
    return [kind for part in get_args(hint) for kind in _kinds(part)]
