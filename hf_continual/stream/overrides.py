"""``--set KEY=VALUE``: single entries of a plan or a recipe, replaced from the command line.

A key is a path with dots: ``sft.learning_rate``, ``tasks.law.train`` or ``tasks.0.train``. Four short names cover what
is changed most: ``model``, ``data``, ``output`` and ``steps``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_continual.paths import ROW_SUFFIXES
from hf_continual.stream.plan_lines import Key, PlanError, PlanLoader, Where

SHORT = {"output": "output_dir"}
# Entries that are names: YAML reads `on`, `no` and `1e3` as something else.
NAMES = ("output_dir", "model", "path", "adapter", "tokenizer", "train", "test", "name")


def override(data: dict[str, Any], pairs: Sequence[str], where: Where, steps: str = "sft.max_steps") -> dict[str, Any]:
    """Apply the values of ``--set`` to a plan or a recipe as read from its file.

    Args:
        data: The plan; changed in place.
        pairs: As written after ``--set``; the last of two for the same key counts.
        where: Gets the entries that no longer come from the file.
        steps: The key that ``steps`` stands for.

    Returns:
        The plan.

    Raises:
        PlanError: If a pair is not KEY=VALUE, or its key is not possible in a plan.
    """
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign or not key:
            raise PlanError(f"--set {pair!r}: write KEY=VALUE, such as --set sft.learning_rate=1e-4.")
        try:
            value = yaml.load(text, PlanLoader)
        except yaml.YAMLError as error:
            raise PlanError(f"--set {pair}: the value is not valid YAML: {getattr(error, 'problem', error)}.") from None
        if key == "data" and "data" not in data and "tasks" in data:
            _move_data(data, text, where, pair)
            continue
        key = steps if key == "steps" else SHORT.get(key, key)
        if key.split(".")[-1] in NAMES and not isinstance(value, dict | list | str | None):
            value = text
        path = _put(data, key.split("."), value, pair)
        where.overridden[path] = f"--set {pair}"
    return data


def _put(data: dict[str, Any], names: Sequence[str], value: Any, pair: str) -> tuple[Key, ...]:
    """Set one entry; returns its path."""
    at: Any = data
    path: list[Key] = []
    for i, name in enumerate(names):
        last = i == len(names) - 1
        if isinstance(at, list):
            place = _place(at, name)
            if place is None:
                known = ", ".join(str(n) for n in (_name(item) for item in at) if n) or f"0 to {len(at) - 1}"
                raise PlanError(
                    f"--set {pair}: there is no entry {name!r} in {'.'.join(names[:i])}. There are {known}."
                )
            path.append(place)
        elif isinstance(at, dict):
            path.append(name)
            if not last and not isinstance(at.get(name), dict | list):
                # `model: NAME` is short for `model: {path: NAME}`.
                is_short = name == "model" and isinstance(at.get(name), str)
                if at.get(name) is not None and not is_short:
                    raise PlanError(_no_keys(pair, names[: i + 1], at[name]))
                at[name] = {"path": at[name]} if is_short else {}
        else:
            raise PlanError(_no_keys(pair, names[:i], at))
        if last:
            at[path[-1]] = value
        else:
            at = at[path[-1]]
    return tuple(path)


def _no_keys(pair: str, names: Sequence[str], value: Any) -> str:
    place = ".".join(names)
    return f"--set {pair}: {place} is {value!r} and has no keys. Set it as a whole: --set {place}=..."


def _place(entries: list[Any], name: str) -> int | None:
    """Index of a list entry, by number or by name."""
    if name.isdigit():
        return int(name) if int(name) < len(entries) else None
    return next((i for i, entry in enumerate(entries) if _name(entry) == name), None)


def _name(entry: Any) -> str | None:
    """The name of a task, or of a method in a list of methods."""
    if not isinstance(entry, dict):
        return None
    return entry.get("name") or (next(iter(entry)) if len(entry) == 1 else None)


def _move_data(data: dict[str, Any], folder: str, where: Where, pair: str) -> None:
    """Read the rows of every task, and of every benchmark outside the tasks, from another folder."""
    if not Path(folder).expanduser().is_dir():
        raise PlanError(
            f"--set {pair}: the folder {folder} does not exist (looked in {Path.cwd()}). `data` is a folder with the plan's "
            f"files; one file is set by its task: --set tasks.NAME.train=FILE."
        )
    tasks = data["tasks"] if isinstance(data["tasks"], list) else [data["tasks"]]
    for i, task in enumerate(task for task in tasks if isinstance(task, dict)):
        if "benchmark" in task:
            task["folder"] = folder
            where.overridden["tasks", i, "folder"] = f"--set {pair}"
        for key in ("train", "test"):
            _move(task, key, folder, ("tasks", i), where, pair)
    gauges = (data.get("evaluation") or {}).get("gauges") or {}
    for name, gauge in gauges.items() if isinstance(gauges, dict) else ():
        if isinstance(gauge, dict):
            _move(gauge, "rows", folder, ("evaluation", "gauges", name), where, pair)


def _move(entry: dict[str, Any], key: str, folder: str, path: tuple[Key, ...], where: Where, pair: str) -> None:
    value = entry.get(key)
    if isinstance(value, str) and Path(value).suffix in ROW_SUFFIXES:
        entry[key] = str(Path(folder) / Path(value).name)
        where.overridden[*path, key] = f"--set {pair}"
