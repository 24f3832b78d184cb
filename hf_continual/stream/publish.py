"""The card of a finished task: written into its folder, so that any task's model can be published as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_continual.hub.facts import CardFacts, Evaluation, GaugeFacts, MergeFacts, TaskFacts
from hf_continual.hub.files import installed_versions, write_card
from hf_continual.hub.refs import ModelRef, is_hub_id, loaded_ref, model_ref
from hf_continual.inference.names import sizes_in
from hf_continual.stream.folders import read_trained
from hf_continual.stream.models import is_adapter
from hf_continual.stream.plan import ALL_TASKS
from hf_continual.stream.results import protocols
from hf_continual.stream.scores import read_stage
from hf_continual.stream.stored_run import BASE_FOLDER
from hf_continual.tasks import Task
from hf_continual.trainer.facts import method_facts, settings_of, trl_tags

if TYPE_CHECKING:
    from hf_continual.stream.prepared import Prepared

SHORT = {
    "overall_performance": "op",
    "backward_transfer": "bwt",
    "forward_transfer": "fwt",
    "forgetting": "forgetting",
}


def write_stage_card(
    prepared: Prepared, task: Task, output_dir: Path, base_dir: Path, intervals: Mapping[str, Any] | None = None
) -> None:
    """Write README.md, continual_config.json, continual_results.json and plots into a finished task's folder.

    Args:
        prepared: The prepared plan.
        task: The task.
        output_dir: The run's folder.
        base_dir: Folder that holds the base model's scores.
        intervals: 95 % intervals by figure, if they belong to this task's line.
    """
    write_card(output_dir / task.folder, stage_facts(prepared, task, output_dir, base_dir, intervals))


def stage_facts(
    prepared: Prepared, task: Task, output_dir: Path, base_dir: Path, intervals: Mapping[str, Any] | None = None
) -> CardFacts:
    """The facts about a finished task; see `write_stage_card`."""
    plan, folder, line = prepared.plan, output_dir / task.folder, prepared.learned(task)
    root = loaded_ref(plan.model.path, plan.model.revision)
    tasks, start = [], root
    for t in line:
        planned = plan.tasks[t.index]
        named = isinstance(planned.train, str) and is_hub_id(planned.train) and not Path(planned.train).exists()
        here = model_ref(output_dir / t.folder)
        tasks.append(
            TaskFacts(
                t.name,
                dataset=planned.train if named else None,
                dataset_split=planned.split if named else None,
                train_rows=None if t.train is None else len(t.train),
                started_from=root if plan.joint or (plan.merge is not None and plan.merge.start == "base") else start,
                checkpoint=None if plan.joint or t.name == task.name else here,
            )
        )
        start = here
    trained = read_trained(folder) or {}
    parent = prepared.runs.parent(task)
    adapter = is_adapter(folder)
    return CardFacts(
        name=task.folder,
        kind="adapter" if adapter else "model",
        base=root,
        parent=None if parent is None or adapter else model_ref(output_dir / parent.folder),
        tasks=tuple(tasks),
        methods=method_facts(prepared.methods(task)),
        merge=_merge(prepared, task, output_dir, line, root),
        training="joint" if plan.joint else None,
        evaluation=stage_evaluation(prepared, line, output_dir, base_dir, intervals),
        settings=settings_of(prepared.config(task, folder)),
        adapter=(sizes_in(folder) or {k: v for k, v in (plan.peft or {}).items()}) if adapter else {},
        seed=plan.seed,
        steps=trained.get("steps"),
        tags=trl_tags(),
        chat=getattr(prepared.tokenizer, "chat_template", None) is not None,
        versions=installed_versions(),
    )


def _merge(prepared: Prepared, task: Task, output_dir: Path, line: Sequence[Task], root: ModelRef) -> MergeFacts | None:
    plan = prepared.plan.merge
    if plan is None or len(line) < 2:
        return None
    names = [t for t in line if t.name != task.name] if plan.start == "base" else [line[-2]]
    inputs = [*(model_ref(output_dir / t.folder) for t in names), ModelRef(name=f"{task.folder} as trained")]
    function = (
        plan.function if isinstance(plan.function, str) else f"{plan.function.__module__}:{plan.function.__qualname__}"
    )
    method = function.rpartition(":")[2].removeprefix("merge_with_").removeprefix("merge_")
    return MergeFacts(method, tuple(inputs), {"function": function, **plan.options})


def stage_evaluation(
    prepared: Prepared,
    line: Sequence[Task],
    output_dir: Path,
    base_dir: Path,
    intervals: Mapping[str, Any] | None = None,
) -> Evaluation:
    """The measured scores along a line of tasks.

    Args:
        prepared: The prepared plan.
        line: Tasks, oldest first; the last is the one described.
        output_dir: The run's folder.
        base_dir: Folder that holds the base model's scores.
        intervals: 95 % intervals by figure.

    Returns:
        The matrix of this line with its base row and gauges.
    """
    scored = prepared.scored(line)
    if not scored:
        return Evaluation()
    names = [t.name for t in scored]
    joint = prepared.joint
    runs = {t.name: t for t in scored} if joint is None else {ALL_TASKS: joint}
    stages = {name: read_stage(output_dir / run.folder) for name, run in runs.items()}
    base = read_stage(base_dir / BASE_FOLDER)
    status = {}
    for moment, cells in (("base", base), *stages.items()):
        for name, cell in cells.items():
            if name in names and cell.get("status", "MEASURED") != "MEASURED":
                status[f"{moment}/{name}"] = cell["status"]
    last = stages[next(reversed(stages))]
    cell = next((last[n] for n in names if n in last), {})
    found = {SHORT[name]: pair for name, pair in (intervals or {}).items() if name in SHORT and pair is not None}
    first = [base.get(n, {}).get("value") for n in names]
    return Evaluation(
        tasks=tuple(names),
        matrix=tuple(tuple(cells.get(n, {}).get("value") for n in names) for cells in stages.values()),
        base_row=tuple(first) if any(v is not None for v in first) else None,
        metric=protocols([last[n] for n in names if n in last]),
        lower_is_better=cell.get("lower_is_better", False),
        rows={n: last[n]["n"] for n in names if n in last and last[n].get("n")},
        status=status,
        gauges=tuple(_gauge(name, base.get(name), last.get(name)) for name in prepared.gauges),
        intervals={name: (pair[0], pair[1]) for name, pair in found.items()},
        row_names=None if joint is None else tuple(stages),
    )


def _gauge(name: str, base: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> GaugeFacts:
    before = None if base is None else base.get("value")
    if now is None:
        return GaugeFacts(name, before, status="NOT_RUN")
    return GaugeFacts(
        name, before, now.get("value"), now.get("lower_is_better", False), now.get("protocol", ""), now.get("n"),
        now.get("status", "MEASURED"), now.get("error"),
    )  # fmt: skip
