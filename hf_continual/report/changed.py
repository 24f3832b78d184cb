"""Predictions that changed from right to wrong, and back, with their text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_continual.atomic_files import DamagedFile, read_lines
from hf_continual.evaluation.files import PREDICTIONS, predictions_file
from hf_continual.intervals import is_share
from hf_continual.report.run import Change, Changes, Run, Stage

LONGEST = 1200  # characters of a text that are shown


def find_changes(run: Run, base_dir: Path, limit: int) -> Changes:
    """Compare the predictions of every stage, row by row.

    A row is `lost` if it was right at a stage and is wrong at the last, `regained` if it was wrong in between. The base
    model is the first stage. Memory holds one task's predictions at a time.

    Args:
        run: The run; what cannot be read is added to its `missing`.
        base_dir: The folder with the base model's predictions; a sweep's runs share one.
        limit: At most as many rows are kept with their text, in turn from each task, lost rows first.

    Returns:
        The changes.
    """
    found = Changes()
    if run.lower:
        return found
    by_task: list[list[Change]] = []
    for task in run.tasks:
        stages = _stages_of(run, task, base_dir)
        if len(stages) < 2:
            continue
        lines = _same_rows(run, task, stages)
        if lines is None:
            continue
        if not all(is_share([row["score"] for row in rows]) for _, rows in lines):
            found.graded.append(task)
        paths = [_path(lines, i) for i in range(len(lines[0][1]))]
        found.counts[task] = _count(paths)
        kinds = [_kind([right for _, right in path]) for path in paths]
        changed = [(kind, i) for kind in ("lost", "regained") for i in range(len(paths)) if kinds[i] == kind]
        by_task.append([_change(task, kind, i, paths[i], lines) for kind, i in changed[:limit]])
    found.shown = list(itertools.islice(_in_turn(by_task), limit))
    order = {task: i for i, task in enumerate(run.tasks)}
    found.shown.sort(key=lambda c: (order[c.task], c.kind != "lost", c.row))
    return found


def _stages_of(run: Run, task: str, base_dir: Path) -> list[tuple[Stage, Path]]:
    """The stages at which a task was scored, with their files. Names come from a file, so only files that are listed count."""
    listed = {d: {p.name for p in (d / PREDICTIONS).glob("*.jsonl")} for d in {base_dir, run.folder}}
    found = []
    for stage in run.stages:
        place = base_dir if stage.index == 0 else run.folder
        file = predictions_file(place, stage.name, task)
        measured = run.cells.get("base" if stage.index == 0 else stage.label, {}).get(task, {})
        if file.name in listed[place] and measured.get("status", "MEASURED") == "MEASURED":
            found.append((stage, place / PREDICTIONS / file.name))
    return found


def _same_rows(run: Run, task: str, stages: Sequence[tuple[Stage, Path]]) -> list[tuple[Stage, list[Any]]] | None:
    """The predictions of a task by stage; None, with a sentence, where they are not of the same rows."""
    lines: list[tuple[Stage, list[Any]]] = []
    try:
        for stage, file in stages:
            rows = read_lines(file)
            if any(not isinstance(row.get("score"), int | float) for row in rows):
                raise DamagedFile(f"{file.name} has rows without a score.")
            lines.append((stage, rows))
    except (DamagedFile, OSError) as error:
        run.missing.append(f"The predictions on {task!r} were left out: {error}")
        return None
    asked = [[(row.get("prompt_hash"), row.get("reference")) for row in rows] for _, rows in lines]
    if any(rows != asked[0] for rows in asked[1:]):
        run.missing.append(f"The predictions on {task!r} were left out: they are not of the same rows at every stage.")
        return None
    return lines if asked[0] else None


def _path(lines: Sequence[tuple[Stage, list[Any]]], row: int) -> tuple[tuple[str, bool], ...]:
    return tuple(
        (stage.label, rows[row]["score"] >= (1 if rows[row]["score"] in (0, 1) else 0.5)) for stage, rows in lines
    )


def _kind(rights: Sequence[bool]) -> str:
    """The change of a row."""
    if True not in rights:
        return "never"
    since = rights[rights.index(True) :]
    if all(since):
        return "kept"
    return "regained" if since[-1] else "lost"


def _count(paths: Sequence[Sequence[tuple[str, bool]]]) -> dict[str, int]:
    kinds = [_kind([right for _, right in path]) for path in paths]
    return {"rows": len(paths), **{kind: kinds.count(kind) for kind in ("kept", "lost", "regained", "never")}}


def _change(
    task: str, kind: str, row: int, path: tuple[tuple[str, bool], ...], lines: Sequence[tuple[Stage, list[Any]]]
) -> Change:
    rights = [right for _, right in path]
    # The last fall: from the last right answer before it to the first wrong one.
    fall = max(i for i in range(1, len(rights)) if rights[i - 1] and not rights[i])
    at = dict.fromkeys((fall - 1, fall, len(rights) - 1))
    first = lines[0][1][row]
    said = tuple((lines[i][0].label, _cut(lines[i][1][row].get("prediction", ""))) for i in at)
    number = first.get("row_id")
    return Change(
        task, number if isinstance(number, int) else row, kind, path, _cut(first.get("prompt", "")),
        _cut(first.get("reference", "")), said,
    )  # fmt: skip


def _cut(text: Any) -> str:
    text = str(text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} characters)"


def _in_turn(by_task: Sequence[Sequence[Change]]) -> Iterator[Change]:
    """One of each task after the other, so that no task crowds the others out; lost rows before regained ones."""
    for kind in ("lost", "regained"):
        columns = [[c for c in changes if c.kind == kind] for changes in by_task]
        for row in itertools.zip_longest(*columns):
            yield from (change for change in row if change is not None)


def counts_summary(changes: Changes) -> Mapping[str, int]:
    """The counts over all tasks."""
    return {kind: changes.total(kind) for kind in ("rows", "kept", "lost", "regained", "never")}
