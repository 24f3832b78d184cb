"""A plan's YAML with the line of every key, so that an error can name its place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

Key = str | int


class PlanError(ValueError):
    """Raised for a plan that cannot be run; the message says where, what and what to do."""


class PlanLoader(yaml.SafeLoader):
    """SafeLoader that reads ``1e-3`` as a number, as YAML 1.2 does."""


PlanLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


class Where:
    """The places of a plan's entries.

    Args:
        file: Name of the file, None for a plan made in Python.
        lines: Line of each entry by its path of keys.

    Attributes:
        overridden: Entries that the command line replaced, by their path: the option that did it.
    """

    def __init__(self, file: str | None = None, lines: dict[tuple[Key, ...], int] | None = None) -> None:
        self.file, self.lines = file, lines or {}
        self.overridden: dict[tuple[Key, ...], str] = {}

    def of(self, path: Sequence[Key]) -> str:
        """Describe a place, such as ``plan.yaml, line 7, tasks[1].train``."""
        known = tuple(path)
        for n in range(len(known), 0, -1):
            if known[:n] in self.overridden:
                return self.overridden[known[:n]]
        while known and known not in self.lines:
            known = known[:-1]
        shown = "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in path).lstrip(".")
        if self.file is None:
            return f"plan, {shown}" if shown else "plan"
        line = f"{self.file}, line {self.lines.get(known, 1)}" if self.lines else self.file
        return f"{line}, {shown}" if shown else line

    def error(self, path: Sequence[Key], message: str) -> PlanError:
        """Build an error at a place."""
        return PlanError(f"{self.of(path)}: {message}")


def read_yaml(file: Path) -> tuple[Any, Where]:
    """Read a plan with the lines of its keys.

    Args:
        file: A YAML file.

    Returns:
        The data, and where its entries are written.

    Raises:
        FileNotFoundError: If there is no such file.
        PlanError: If it is not valid YAML, or a key is given twice.
    """
    if not file.is_file():
        raise FileNotFoundError(f"There is no plan {str(file)!r} (looked in {Path.cwd()}).")
    where = Where(str(file))
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise PlanError(
            f"{file}, line {line}: the byte 0x{raw[error.start]:02x} is not UTF-8. Save the plan as UTF-8 text."
        ) from error
    try:
        node = yaml.compose(text, PlanLoader)
        if node is None:
            raise PlanError(f"{file} is empty, and a plan needs at least model, output_dir and tasks.")
        _collect(node, (), where)
        return yaml.load(text, PlanLoader), where
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise PlanError(f"{file}{line}: not valid YAML: {getattr(error, 'problem', None) or error}.") from error
    except RecursionError as error:
        raise PlanError(f"{file}: its entries are nested too deeply to be read.") from error
    except (ValueError, TypeError, OverflowError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"{file}: a value of the plan cannot be read: {error}.") from error


def _collect(node: yaml.Node, path: tuple[Key, ...], where: Where) -> None:
    where.lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _collect(item, (*path, i), where)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, key.value)
            if inner in where.lines:
                where.lines[inner] = key.start_mark.line + 1
                raise where.error(inner, f"the key {key.value!r} is given twice; keep one.")
            where.lines[inner] = key.start_mark.line + 1
            _collect(value, inner, where)
