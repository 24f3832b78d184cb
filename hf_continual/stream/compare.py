"""Compare two runs on the same rows: is the difference significant?"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_continual.atomic_files import read_lines, read_object
from hf_continual.evaluation.files import file_name, predictions_file
from hf_continual.hub.facts import RESULTS
from hf_continual.paired import PairedTest, paired_test
from hf_continual.stream.plan import JOINT
from hf_continual.stream.scores import read_stage, row_values


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
        _check_same_rows(task, a[task], b[task], first, second)
    scores = [{t: run[t]["values"] for t in shared} for run in (a, b)]
    by_task = {t: paired_test({t: scores[0][t]}, {t: scores[1][t]}) for t in shared}
    return {**by_task, "overall": paired_test(scores[0], scores[1])}


def last_rows(run: Path, tasks: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Each task's row scores after the last task.

    Args:
        run: The run's folder.
        tasks: Its scored tasks in order; by default those of its results.

    Returns:
        By task ``values`` (higher is better), ``rows`` (what they are told apart by) and ``protocol`` (how they were scored).

    Raises:
        FileNotFoundError: If it is not the folder of a finished run.
        ValueError: If it names no tasks.
    """
    if tasks is None:
        tasks = _tasks_of(run)
    joint = (run / RESULTS).is_file() and read_object(run / RESULTS).get("between_tasks") == JOINT
    last = JOINT if joint else tasks[-1]
    stages = sorted(run.glob(f"task-*-{glob.escape(file_name(last))}"))
    if not stages:
        raise FileNotFoundError(
            f"{run} has no folder of its last task {last!r}: the run is not finished. Run it again."
        )
    cells, found = read_stage(stages[-1]), {}
    for task in (t for t in tasks if cells.get(t, {}).get("status") == "MEASURED"):
        lines = read_lines(predictions_file(run, stages[-1].name, task))
        sign = -1.0 if cells[task].get("lower_is_better") else 1.0
        found[task] = {
            "values": [sign * value for value in row_values(lines)],
            "rows": [(line["prompt_hash"], line["reference"]) for line in lines],
            "protocol": cells[task]["protocol"],
        }
    return found


def _tasks_of(run: Path) -> list[str]:
    """The scored tasks of a run, from its results."""
    if not (run / RESULTS).is_file():
        raise FileNotFoundError(
            f"{run} has no {RESULTS}: it is not the folder of a run. Run its plan, or name another."
        )
    tasks = read_object(run / RESULTS).get("tasks")
    if not tasks:
        raise ValueError(f"{run / RESULTS} names no scored tasks. Name the folder of one run, not that of a sweep.")
    return tasks


def _check_same_rows(task: str, a: Mapping[str, Any], b: Mapping[str, Any], first: Any, second: Any) -> None:
    if a["protocol"] != b["protocol"]:
        raise ValueError(
            f"task {task!r} was scored in different ways: {a['protocol']!r} in {first}, {b['protocol']!r} in {second}. Score both "
            f"with the same metric."
        )
    if a["rows"] != b["rows"]:
        at = next((i for i, pair in enumerate(zip(a["rows"], b["rows"], strict=False)) if pair[0] != pair[1]), None)
        what = f"row {at + 1} differs" if at is not None else f"{len(a['rows'])} and {len(b['rows'])} rows"
        raise ValueError(
            f"task {task!r} was scored on different rows in {first} and in {second} ({what}). Only the same rows can be paired: "
            f"give both runs the same test file, the same test_rows and the same data_seed."
        )


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
