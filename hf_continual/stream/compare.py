"""Compare two runs on the same rows: is the difference significant?"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_continual.paired import PairedTest, paired_test
from hf_continual.stream.stored_run import StoredRun, StoredScore, check_same_rows


def compare_runs(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> dict[str, PairedTest]:
    """Compare the last models of two runs of a plan, row by row.

    Example:
        >>> compare_runs("out/plain-seed0", "out/replay-seed0")["overall"].p_value

    Args:
        first: Folder of a run, such as the baseline's.
        second: Folder of another run, on the same test rows.

    Returns:
        By task, and over all tasks as ``"overall"``; differences above 0 favour the second. See `paired_test`.

    Raises:
        FileNotFoundError: If a folder is not the folder of a finished run.
        ValueError: If tasks, rows or metrics differ.
    """
    return compare_rows(last_rows(Path(first)), last_rows(Path(second)), first, second)


def compare_rows(a: Mapping[str, Any], b: Mapping[str, Any], first: Any, second: Any) -> dict[str, PairedTest]:
    """As `compare_runs`, of rows that were read already.

    Args:
        a: What `last_rows` gives of the first run.
        b: The same of the second.
        first: Name of the first run, for messages.
        second: Name of the second.

    Returns:
        By task, and over all tasks as ``"overall"``.

    Raises:
        ValueError: If tasks, rows or metrics differ.
    """
    if not set(a) & set(b):
        raise ValueError(
            f"{first} and {second} have no scored task in common ({', '.join(a)} and {', '.join(b)}). Compare runs of "
            f"the same tasks."
        )
    shared = [task for task in a if task in b]
    for task in shared:
        check_same_rows(task, a[task], b[task], first, second)
    scores = [{t: run[t].better for t in shared} for run in (a, b)]
    by_task = {t: paired_test({t: scores[0][t]}, {t: scores[1][t]}) for t in shared}
    return {**by_task, "overall": paired_test(scores[0], scores[1])}


def last_rows(run: Path, tasks: Sequence[str] | None = None) -> dict[str, StoredScore]:
    """Each task's score of the last model, row by row.

    Args:
        run: The run's folder.
        tasks: Its scored tasks in order; by default those of its results.

    Returns:
        The scores by task; tasks that were not measured are left out.

    Raises:
        FileNotFoundError: If it is not the folder of a finished run.
        ValueError: If it names no tasks.
    """
    stored = StoredRun(run, tasks)
    return {task: score for task in stored.tasks if (score := stored.last(task)) is not None}


def compare_arms(
    arms: Sequence[tuple[str, Mapping[int, Mapping[str, Sequence[float]]]]], lower_is_better: bool = False
) -> list[dict[str, Any]]:
    """Compare every arm of a sweep with the first, by the rows' scores after the last task.

    Args:
        arms: Name, and by seed, the scores of every row by task; for one order of tasks.
        lower_is_better: Whether scores are losses.

    Returns:
        For each comparison the names, the common seeds, and a `PairedTest`; with several seeds a row's score is its
        mean over them, so the test generalises over rows, for these seeds. Differences above 0 favour the second.
    """
    found = []
    for name, seeds in arms[1:]:
        first, base = arms[0]
        shared = sorted(set(base) & set(seeds))
        if not shared:
            continue
        sign = -1.0 if lower_is_better else 1.0
        means = [
            {task: _means([run[s][task] for s in shared], sign) for task in base[shared[0]]} for run in (base, seeds)
        ]
        if not means[0]:
            continue
        found.append({"first": first, "second": name, "seeds": shared, **paired_test(means[0], means[1]).to_dict()})
    return found


def _means(scores: Sequence[Sequence[float]], sign: float) -> list[float]:
    return [sign * sum(values) / len(values) for values in zip(*scores, strict=True)]
