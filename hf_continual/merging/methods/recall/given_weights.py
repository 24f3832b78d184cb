"""Weights that a user sets, or reuses from a report."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_continual.atomic_files import read_json
from hf_continual.merging.errors import MergeError
from hf_continual.merging.inputs.checkpoint import Checkpoint
from hf_continual.merging.inputs.structure import groups_of, ordered

DEFAULT = "default"


def read_weights(
    weights: Mapping[str, Sequence[float]] | str | os.PathLike[str],
    number: int,
    names: Sequence[str],
    config: Mapping[str, Any],
    models: Sequence[str],
) -> tuple[dict[str, str], dict[str, list[float]]]:
    """The group of each tensor, and the weights of each group.

    Args:
        weights: One list per group, or the file of a report.
        number: How many models there are.
        names: The tensors' names.
        config: The models' configuration.
        models: Their names, for messages.

    Returns:
        Name of a tensor -> its group, and group -> weights that sum to one.

    Raises:
        ValueError: If a group is missing, unknown, or has weights of a wrong number or sum.
    """
    given: Mapping[str, Any] = weights if isinstance(weights, Mapping) else read_json(Path(weights))["weights"]
    try:
        groups = groups_of(names, config)
    except MergeError:
        if set(given) != {DEFAULT}:
            raise
        groups = dict.fromkeys(names, DEFAULT)
    wanted = ordered(groups.values())
    if unknown := [g for g in given if g not in wanted and g != DEFAULT]:
        raise ValueError(f"weights name the groups {', '.join(unknown)}; the model has only {', '.join(wanted)}.")
    found = {}
    for group in wanted:
        if group not in given and DEFAULT not in given:
            raise ValueError(f"weights have no entry for {group!r} and none for {DEFAULT!r}. Give one of them.")
        row = [float(w) for w in given.get(group, given.get(DEFAULT, ()))]
        if len(row) != number:
            raise ValueError(f"weights[{group!r}] has {len(row)} numbers for {number} models ({', '.join(models)}).")
        if abs(sum(row) - 1.0) > 1e-6:
            raise ValueError(f"weights[{group!r}] = {row} sum to {sum(row)}; they must sum to 1.")
        found[group] = row
    return groups, found


def warn_other_base(weights: Mapping[str, Any] | str | os.PathLike[str], full: Checkpoint | None) -> None:
    """Warn if a report's weights are used with a base that was read differently: the output bytes will differ.

    Args:
        weights: What the user gave.
        full: The base.
    """
    if isinstance(weights, Mapping):
        return
    then = [m["seen_as"] for m in read_json(Path(weights)).get("models", ()) if m.get("seen_as")]
    now = None if full is None or full.seen_as is None else json.loads(json.dumps(full.seen_as))
    if (then[0] if then else None) != now:
        warnings.warn(
            f"the merge of {os.fspath(weights)} applied its adapters to {_told(then[0] if then else None)}, this one to "
            f"{_told(now)}: the result has different bytes. Give the same quantized_base= to reproduce it.",
            UserWarning,
            stacklevel=4,
        )


def _told(seen_as: Mapping[str, Any] | None) -> str:
    return "the base as stored" if seen_as is None else f"the base as quantised by {dict(seen_as)}"
