"""A finished run as it lies on the disk: its scores with the rows that they rest on."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_continual.atomic_files import read_lines, read_object
from hf_continual.evaluation.files import file_name, predictions_file
from hf_continual.hub.facts import RESULTS
from hf_continual.stream.plan import JOINT
from hf_continual.stream.scores import read_stage, row_values

BASE_FOLDER = "base"
TRAIN_RESULTS, AFTER = "train_results.json", "after"  # of `hf-continual train`, and where its scores after training are


class NotARun(FileNotFoundError):
    """A folder that is not that of a run."""


@dataclass(frozen=True)
class StoredScore:
    """What a model scored on a task or a gauge, row by row.

    Args:
        values: One per row, as it was measured; their mean is the score.
        rows: What tells the rows apart: hash of the prompt, and the reference.
        protocol: How they were scored.
        lower_is_better: Whether they are losses.
    """

    values: Sequence[float]
    rows: Sequence[tuple[Any, Any]]
    protocol: str
    lower_is_better: bool = False

    @property
    def better(self) -> list[float]:
        """The values with the sign at which higher is better."""
        return [-v for v in self.values] if self.lower_is_better else list(self.values)


class StoredRun:
    """The scores of a run of a plan, or of `hf-continual train`. Reads no weights.

    Args:
        folder: The run's folder.
        tasks: Its scored tasks in order; by default those of its results.

    Attributes:
        tasks: The scored tasks of the last task's line, in their order.
        gauges: The general gauges.
        complete: Whether every task of its plan is finished; None where the file does not say.
        single: Whether it is the folder of `hf-continual train`: one task, scored before and after.

    Raises:
        NotARun: If it is not the folder of a run.
        ValueError: If it is that of a sweep.
    """

    def __init__(self, folder: Path, tasks: Sequence[str] | None = None) -> None:
        self.folder = folder
        self.single: bool = tasks is None and (folder / TRAIN_RESULTS).is_file()
        if self.single:
            tasks = self._single_task()
        if tasks is None and not (folder / RESULTS).is_file():
            raise NotARun(
                f"{folder} has no {RESULTS}: it is not the folder of a run. Run its plan, or give another folder."
            )
        has_results = (folder / RESULTS).is_file() and not self.single
        results = read_object(folder / RESULTS) if has_results else {}
        self.tasks: list[str] = list(tasks or results.get("tasks") or ())
        self.joint: bool = results.get("between_tasks") == JOINT
        if not self.tasks:
            raise ValueError(
                f"{folder / RESULTS} lists no scored tasks. Give the folder of a single run, not of a sweep."
            )
        self.gauges: list[str] = list(results.get("gauges") or ())
        self.complete: bool | None = results.get("complete")
        self._cells: dict[Path, dict[str, Any]] = {}

    def _single_task(self) -> list[str]:
        """The one task of `hf-continual train`."""
        if scored := list(read_stage(self.folder / AFTER)):
            return scored[:1]
        raise ValueError(
            f"{self.folder} has no scores after its training. Train with --test ROWS.jsonl, which the same command adds."
        )

    def stage(self, after: str | None) -> Path:
        """The folder of a task's model; of None that of the base's scores, which the runs of a sweep share.

        Args:
            after: The task.

        Returns:
            The folder.

        Raises:
            FileNotFoundError: If it is not there.
        """
        if after is None:
            own = self.folder / BASE_FOLDER
            return own if own.is_dir() else self.folder.parent / BASE_FOLDER
        if self.single:
            return self.folder / AFTER
        named = re.compile(rf"task-\d+-{re.escape(file_name(after))}")
        for found in sorted(self.folder.glob(f"task-*-{glob.escape(file_name(after))}")):
            if named.fullmatch(found.name):
                return found
        raise FileNotFoundError(
            f"{self.folder} has no folder of its task {after!r}: the run is not finished. Run it again."
        )

    def scored(self, after: str | None, name: str) -> StoredScore | None:
        """What the model after a task scored.

        Args:
            after: The task; None is the base model.
            name: A task or a gauge.

        Returns:
            The score; None where it was not measured, or its predictions are not those that it rests on.
        """
        stage = self.stage(after)
        if stage not in self._cells:
            self._cells[stage] = read_stage(stage)
        cell = self._cells[stage].get(name, {})
        if cell.get("status") != "MEASURED":
            return None
        lines = read_lines(predictions_file(stage.parent, stage.name, name))
        rows = [(line["prompt_hash"], line["reference"]) for line in lines]
        return StoredScore(row_values(lines), rows, cell["protocol"], bool(cell.get("lower_is_better")))

    def last(self, name: str) -> StoredScore | None:
        """What the last model scored."""
        return self.scored(JOINT if self.joint else self.tasks[-1], name)

    def matrix_rows(self) -> dict[tuple[int, int], Sequence[float]]:
        """Every measured cell of the accuracy matrix by ``(after, task)``; `after` = -1 is the base model."""
        found = {}
        moments: list[tuple[int, str | None]] = [(-1, None), *enumerate(self.tasks)]
        if self.joint:
            moments = [(-1, None), (len(self.tasks) - 1, JOINT)]
        for i, after in moments:
            for j, task in enumerate(self.tasks):
                if (score := self.scored(after, task)) is not None:
                    found[i, j] = score.values
        return found


def check_same_rows(name: str, a: StoredScore, b: StoredScore, first: Any, second: Any) -> None:
    """Refuse to pair scores of other rows, or scored in another way.

    Args:
        name: The task or gauge.
        a: Its score in one run.
        b: Its score in another.
        first: The one run, as the error names it.
        second: The other.

    Raises:
        ValueError: If they cannot be paired.
    """
    if a.protocol != b.protocol:
        raise ValueError(
            f"task {name!r} was scored in different ways: {a.protocol!r} in {first}, {b.protocol!r} in {second}. Score both "
            f"with the same metric."
        )
    if a.rows != b.rows:
        at = next((i for i, pair in enumerate(zip(a.rows, b.rows, strict=False)) if pair[0] != pair[1]), None)
        what = f"row {at + 1} differs" if at is not None else f"{len(a.rows)} and {len(b.rows)} rows"
        raise ValueError(
            f"task {name!r} was scored on different rows in {first} and in {second} ({what}). Only the same rows can be paired: "
            f"give both runs the same test file, the same test_rows and the same data_seed."
        )
