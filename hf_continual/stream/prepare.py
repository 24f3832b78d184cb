"""Prepare a plan: rows loaded, mapped and checked, scorers built; no weights yet."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from hf_continual.atomic_files import read_lines
from hf_continual.data.biography import biography_rows
from hf_continual.data.buffer import Memory
from hf_continual.data.columns import check_columns, cut_prompts, map_columns, take, without_options
from hf_continual.data.row_values import TEXTUAL, check_values
from hf_continual.data.rows import load_rows
from hf_continual.evaluation.files import file_name
from hf_continual.evaluation.table import Scorer, build_scorer, check_answers, columns_of, with_labels
from hf_continual.methods.base import Method
from hf_continual.methods.compose import Methods, check_heirs, kind_of, overrides
from hf_continual.methods.table import build_methods
from hf_continual.stream.models import load_tokenizer
from hf_continual.stream.past_rows import TRAINABLE, KeptRows, with_earlier
from hf_continual.stream.plan import MemoryPlan, Plan, TaskPlan
from hf_continual.stream.plan_gauges import with_earlier_tests
from hf_continual.stream.plan_lines import Key, PlanError, Where
from hf_continual.stream.start import split_adapter
from hf_continual.tasks import BASE, Task, TaskStream, check_parents
from hf_continual.trainer.config import ContinualConfig

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs except the weights.

    Args:
        plan: As read.
        where: Places of its entries.
        stream: The tasks with their rows.
        tokenizer: The model's.
        scorers: Scorer of each scored task and gauge by name.
        gauges: Rows of each gauge by name; None if its metric has its own rows.
        memory: Rows kept for later tasks, None if none are.
    """

    plan: Plan
    where: Where
    stream: TaskStream
    tokenizer: Any
    scorers: Mapping[str, Scorer]
    gauges: Mapping[str, Dataset | None]
    memory: KeptRows | None = None

    def scored(self, tasks: Sequence[Task] | None = None) -> list[Task]:
        """The tasks that have rows to score."""
        return [t for t in (self.stream if tasks is None else tasks) if t.test is not None]

    def columns_after(self, task: Task | None) -> list[Task]:
        """The tasks to score after a task; None is the base model, which is scored on all of them."""
        asked = self.plan.evaluation.tasks
        if task is None or asked == "all":
            return self.scored()
        names = set(asked) if isinstance(asked, list) else {t.name for t in self.stream.lineage(task)}
        names |= set(self.plan.tasks[task.index].evaluate)
        return [t for t in self.scored() if t.name in names]

    def options(self, task: Task) -> dict[str, Any]:
        """Options of SFTConfig for a task."""
        return {**self.plan.sft, **self.plan.tasks[task.index].sft}

    def config(self, task: Task, folder: Path) -> ContinualConfig:
        """The training arguments of a task."""
        defaults: dict[str, Any] = {"save_total_limit": 1, "report_to": "none"}
        seed = self.plan.seed
        return ContinualConfig(
            output_dir=str(folder),
            task_name=task.name,
            task_index=task.index,
            seed=seed,
            **{**defaults, **with_earlier_tests(self.options(task), task, self.stream)},
        )

    def methods(self, task: Task) -> list[Method]:
        """Fresh methods for a task, with the rows of earlier tasks."""
        own = self.plan.tasks[task.index].methods
        description = self.plan.methods if own is None else own
        if isinstance(description, Sequence) and description and all(isinstance(m, Method) for m in description):
            return [replace(m) for m in description]  # pyrefly: ignore[bad-specialization]
        return build_methods(with_earlier(description, task, self.stream, self.memory))


def prepare(plan: Plan, where: Where) -> Prepared:
    """Load rows, build scorers and check every task's arguments and methods.

    Args:
        plan: As read.
        where: Places of its entries.

    Returns:
        The prepared plan.

    Raises:
        PlanError: If something in it cannot be used; names the place.
    """
    with _at(where, ("model",)):
        plan = split_adapter(plan, where)
        tokenizer = load_tokenizer(plan.model)
    _check_parents(plan, where)
    scorers: dict[str, Scorer] = {}
    tasks = []
    for i, task in enumerate(plan.tasks):
        metric = plan.evaluation.metric if task.metric is None else task.metric
        place: tuple[Key, ...] = ("evaluation", "metric") if task.metric is None else ("tasks", i, "metric")
        train = _rows(task, "train", plan, tokenizer, where, i, (*TEXTUAL, "input_ids"))
        test = None
        if task.test is not None:
            with _at(where, place):
                build_scorer(metric, plan.evaluation.batch_size)
            test = _rows(task, "test", plan, tokenizer, where, i, (*columns_of(metric), "messages"))
            with _at(where, place if task.metric is not None else ("tasks", i, "columns" if task.columns else "test")):
                check_columns(test, columns_of(metric, test.column_names), f"scoring task {task.name!r}")
                check_answers(metric, test, tokenizer)
                scorers[task.name] = build_scorer(with_labels(metric, test), plan.evaluation.batch_size)
        tasks.append(Task(task.name, i, train, test, task.parent))
    gauges: dict[str, Dataset | None] = {}
    for name, gauge in plan.evaluation.gauges.items():
        place = ("evaluation", "gauges", name)
        if name in scorers:
            raise where.error(place, f"the gauge {name!r} has the name of a task; give it another.")
        with _at(where, place):
            scorers[name] = build_scorer(gauge.metric)
            rows = None
            if gauge.rows is not None:
                checked = () if gauge.columns else columns_of(gauge.metric)
                rows = take(_load(gauge.rows, gauge.split, checked), gauge.limit, plan.data_seed)
                if gauge.columns:
                    rows = map_columns(rows, gauge.columns)
                    check_values(rows, f"the gauge {name!r}, after its columns were mapped", columns_of(gauge.metric))
                check_columns(rows, columns_of(gauge.metric, rows.column_names), f"the gauge {name!r}")
                check_answers(gauge.metric, rows, tokenizer)
            elif columns_of(gauge.metric):
                raise ValueError(f"the gauge {name!r} needs rows. Give a file or a Hub id: rows: general.jsonl")
        gauges[name] = rows
    with _at(where, ("tasks",)):
        stream = TaskStream(tasks)
        _check_scored_names(list(scorers))
    prepared = Prepared(plan, where, stream, tokenizer, scorers, gauges, _memory(plan, where, stream))
    for task in stream:
        own: tuple[Key, ...] = ("tasks", task.index)
        with (
            _at(where, (*own, "sft") if plan.tasks[task.index].sft else ("sft",)),
            tempfile.TemporaryDirectory() as folder,
        ):
            prepared.config(task, Path(folder))
        with _at(where, ("methods",) if plan.tasks[task.index].methods is None else (*own, "methods")):
            _check_heirs(prepared, task, Methods(prepared.methods(task)))
    return prepared


def _check_heirs(prepared: Prepared, task: Task, methods: Methods) -> None:
    """Refuse a task that drops a method whose state the previous task will leave, before anything is trained."""
    parent, merge = prepared.stream.parent(task), prepared.plan.merge
    if parent is None or not methods or prepared.options(task).get("fresh_methods"):
        return
    if merge is not None and merge.start == "base":
        return  # every task starts from the base, which has no methods' state
    before = Methods(prepared.methods(parent))
    left = [(m.name, kind_of(type(m)), "") for m in before if overrides(type(m), "task_state")]
    check_heirs(left, methods, f"task {task.name!r} continues from {parent.name!r}, whose model")


def _check_scored_names(names: Sequence[str]) -> None:
    """Refuse two names whose predictions would share one file."""
    files: dict[str, str] = {}
    for name in names:
        if (other := files.setdefault(file_name(name), name)) != name:
            raise ValueError(f"{other!r} and {name!r} give the same file name ({file_name(name)}); rename one.")


def _memory(plan: Plan, where: Where, stream: TaskStream) -> KeptRows | None:
    """The rows that the plan's buffer keeps after each task, chosen before anything is trained."""
    if not isinstance(plan.memory, MemoryPlan):
        return None
    start: list[dict[str, Any]] = []
    if plan.memory.start is not None:
        with _at(where, ("memory", "start")):
            start = read_lines(Path(plan.memory.start).expanduser())
            if not start:
                raise ValueError(f"{plan.memory.start} holds no rows. Leave start out to start with none.")
    with _at(where, ("memory",)):
        memory = Memory(**plan.memory.model_dump(exclude={"start"}), start=start)
        return KeptRows(memory, stream, {t.name: _named(t.train) for t in plan.tasks})


def _named(source: Any) -> str:
    if isinstance(source, str | Path):
        return str(source)
    return json.dumps(source, default=str) if isinstance(source, Mapping) else "rows in Python"


@contextmanager
def _at(where: Where, path: Sequence[Key]) -> Iterator[None]:
    """Turn errors inside the context into errors of the plan at this place."""
    try:
        yield
    except PlanError:
        raise
    except (ValueError, TypeError, OSError, KeyError, ImportError) as error:
        raise where.error(path, str(error)) from error


def _check_parents(plan: Plan, where: Where) -> None:
    names = [(task.name, task.parent) for task in plan.tasks]
    for i, (name, parent) in enumerate(names):
        with _at(where, ("tasks", i, "parent" if parent else "name")):
            TaskStream([Task(name)])
            if name in [n for n, _ in names[:i]]:
                raise ValueError(f"two tasks are called {name!r}; names identify tables and folders.")
    try:
        check_parents(names)
    except ValueError as error:
        # The message quotes its task first.
        about = next(
            (
                i
                for i, (n, p) in enumerate(names)
                if (p and p != BASE and f"{n!r}" in str(error)) or f" {n} ->" in str(error)
            ),
            0,
        )
        raise where.error(("tasks", about, "parent"), str(error)) from error


def _rows(
    task: TaskPlan, which: str, plan: Plan, tokenizer: Any, where: Where, index: int, wanted: Sequence[str]
) -> Dataset:
    """The rows of a task for training or scoring, with the `wanted` columns checked."""
    path = ("tasks", index)
    source, split = (task.train, task.split) if which == "train" else (task.test, task.test_split)
    with _at(where, (*path, which)):
        rows = _load(source, split, () if task.columns else wanted)
    rows = take(rows, task.train_rows if which == "train" else task.test_rows, plan.data_seed)
    if task.columns:
        with _at(where, (*path, "columns")):
            rows = map_columns(rows, task.columns, task.labels)
            check_values(rows, f"{_named(source)}, after its columns were mapped", wanted)
    elif task.labels:
        raise where.error(
            (*path, "labels"), "labels name the classes of a column; set it with columns: {completion: ' {label}'}."
        )
    if task.drop_options:
        with _at(where, (*path, "drop_options")):
            check_columns(rows, ("prompt",), "drop_options")
            rows = without_options(rows)
    if task.max_prompt_tokens:
        with _at(where, (*path, "max_prompt_tokens")):
            check_columns(rows, ("prompt",), "max_prompt_tokens")
            rows = cut_prompts(rows, task.max_prompt_tokens, tokenizer)
    if which == "train":
        with _at(where, (*path, "columns" if task.columns else "train")):
            _check_trainable(rows, task.name)
    return rows


def _check_trainable(rows: Dataset, name: str) -> None:
    if "input_ids" not in rows.column_names and not any(set(kind) <= set(rows.column_names) for kind in TRAINABLE):
        check_columns(rows, ("prompt", "completion"), f"training task {name!r} on answers")


def _load(source: Any, split: str, checked: Sequence[str]) -> Dataset:
    if isinstance(source, Mapping):
        if list(source) != ["biography"] or not isinstance(source["biography"], Mapping):
            raise ValueError(
                f"rows are a path, a Hub id, a list of rows, or {{biography: {{...}}}}; got {dict(source)!r}."
            )
        return biography_rows(**source["biography"])
    return load_rows(source, split, checked)


def fingerprint(rows: Dataset | Sequence[Mapping[str, Any]] | None) -> dict[str, Any] | None:
    """Number of rows, and a hash of their content."""
    if rows is None:
        return None
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
    return {"rows": len(rows), "sha256": digest.hexdigest()[:16]}
