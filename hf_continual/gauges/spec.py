"""Parse the gauges in a configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from hf_continual.bounds import whole_number
from hf_continual.data.rows import load_rows
from hf_continual.methods.base import Run
from hf_continual.named import did_you_mean

TASK = "task"
OPTIONS = ("every", "batch_size")
_KEYS = ("rows", "kl", "limit", "max_length", "source")


class _Named:
    """A stand-in for a method if only its name matters."""

    def __init__(self, name: str) -> None:
        self.name = name


@dataclass(frozen=True)
class Gauge:
    """A handful of rows to measure.

    Args:
        given: The rows as given; None for the first rows of the task.
        kl: Whether to measure the KL from the base model.
        limit: Maximum number of rows.
        max_length: Number of tokens to which a row is truncated.
        source: Name of the method whose replay rows are used instead.
    """

    given: Any = None
    kl: bool = False
    limit: int = 32
    max_length: int = 512
    source: str | None = None

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of its measures."""
        return ("loss", "exact", "loss_change", "exact_change", "loss_ratio", *(["kl"] if self.kl else []))

    def rows(self, run: Run) -> Dataset:
        """The rows."""
        if self.given is not None:
            return load_rows(self.given)
        rows: Any = run.task_rows if self.source is None else run.rows(_Named(self.source))
        return rows.select(range(min(self.limit, len(rows))))


def read_gauges(given: Any) -> tuple[dict[str, Gauge], dict[str, Any]]:
    """Parse ``ContinualConfig(gauges=...)``.

    Args:
        given: A mapping of names to rows (a file, a Hub id, a `datasets.Dataset`, a list of rows), or to
            ``{rows, kl, limit, max_length}``. ``task: {}`` takes the first rows of the task itself and measures the KL.
            ``every`` (optimizer steps) and ``batch_size`` are keys next to the names. True is ``{"task": {}}``.

    Returns:
        The gauges by name, and the options.

    Raises:
        TypeError: If it is not a mapping.
        ValueError: If a key is unknown, or a gauge has no rows.
    """
    if given is True:
        given = {TASK: {}}
    if not isinstance(given, Mapping):
        raise TypeError(
            f"gauges={given!r} must be a mapping of names to rows, such as {{general: general.jsonl, old: old.jsonl, every: 50}}, "
            f"got {type(given).__name__}."
        )
    options = {key: given[key] for key in OPTIONS if key in given}
    return {str(name): _gauge(str(name), value) for name, value in given.items() if name not in OPTIONS}, options


def _gauge(name: str, given: Any) -> Gauge:
    """One gauge, checked."""
    if "/" in name or not name:
        raise ValueError(
            f"gauges has the name {name!r}: logs call it gauge/NAME/loss, so it must not be empty or contain '/'."
        )
    if not isinstance(given, Mapping):
        if not isinstance(given, str | Sequence | Dataset):
            raise TypeError(
                f"gauge {name!r} must be rows or a mapping with 'rows', got {given!r} ({type(given).__name__})."
            )
        given = {"rows": given}
    given = dict[str, Any](given)
    if unknown := [key for key in given if key not in _KEYS]:
        hint = did_you_mean(unknown[0], _KEYS)
        raise ValueError(f"gauge {name!r} has the unknown key {unknown[0]!r}.{hint} Known are {', '.join(_KEYS[:-1])}.")
    if given.get("rows") is None and name != TASK and given.get("source") is None:
        raise ValueError(f"gauge {name!r} has no rows. Give some, {{rows: FILE}}; only 'task' uses the task's own.")
    for key in ("limit", "max_length"):
        if key in given:
            whole_number(f"gauge {name!r} ", key, given[key])
    kl = given.get("kl", name == TASK)
    if not isinstance(kl, bool):
        raise TypeError(f"gauge {name!r}: kl={kl!r} must be true or false.")
    numbers = {key: given[key] for key in ("limit", "max_length") if key in given}
    return Gauge(given.get("rows"), kl, source=given.get("source"), **numbers)
