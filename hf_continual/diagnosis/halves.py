"""Old rows in two halves: one that a short training is shown, one that it is not."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset

from hf_continual.evaluation.prompts import prompt_hash

LEAST = 8  # rows of a half


def halves(rows: Dataset, seed: int = 0, group: str | None = None) -> tuple[Dataset, Dataset]:
    """Split rows at random, so that rows that belong together stay together.

    Args:
        rows: The rows.
        seed: Seed of the split.
        group: Column of what belongs together, such as the person that a question is about; by default rows of the same prompt.

    Returns:
        The half that is shown, and the half that is held.

    Raises:
        ValueError: If the column is not there, or there are too few groups or rows.
    """
    if group is not None and group not in rows.column_names:
        raise ValueError(f"group={group!r}: the rows have no such column, only {', '.join(rows.column_names)}.")
    owners = [_owner(dict(row), group) for row in rows]  # pyrefly: ignore[no-matching-overload]
    names = sorted(set(owners))
    order = np.random.default_rng([seed, 41]).permutation(len(names))
    chosen = {names[i] for i in order[: len(names) // 2]}
    shown = [i for i, owner in enumerate(owners) if owner in chosen]
    held = [i for i, owner in enumerate(owners) if owner not in chosen]
    if min(len(shown), len(held)) < LEAST:
        what = f"{len(rows)} rows of {len(names)} {'prompts' if group is None else f'values of {group!r}'}"
        raise ValueError(
            f"{what} make halves of {len(shown)} and {len(held)} rows, and {LEAST} are the least that says anything. Give more old "
            f"rows; some hundred tell most."
        )
    return rows.select(shown), rows.select(held)  # pyrefly: ignore[bad-return]


def _owner(row: dict[str, Any], group: str | None) -> str:
    return prompt_hash(row) if group is None else str(row[group])
