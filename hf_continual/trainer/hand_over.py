"""Hand-over between tasks: methods load state when training starts, and leave it when a finished task is saved."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from peft import PeftModel

from hf_continual.data import handover
from hf_continual.data.distributed import from_first
from hf_continual.data.kept import FRESH
from hf_continual.hub.text import safe
from hf_continual.methods.compose import check_heirs, overrides
from hf_continual.tensors.identity import base_sample
from hf_continual.trainer.predecessor import find_predecessor, is_unfinished

if TYPE_CHECKING:
    from hf_continual.trainer.live import LiveTrainer

logger = logging.getLogger(__name__)


LEFT = "_hf_continual_left"  # attribute of a model that was trained in this process


@dataclass(frozen=True)
class Left:
    """State kept with a model that stays in the process, since a script may train several tasks on it.

    Args:
        found: What its methods left; None if they left nothing.
        weights: Version counter of each weight when the task ended.
    """

    found: handover.HandOver | None
    weights: tuple[int, ...]


def leave_with_model(trainer: LiveTrainer) -> None:
    """Attach what methods left to the model in this process, too."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    states = {name: state for name, state in (trainer.task_states or {}).items() if state}
    found = None
    if states:
        task = trainer.run.task
        kinds = {name: (kind, options) for name, kind, options in trainer.methods.kinds()}
        kept = tuple(handover.Kept(name, *kinds[name], files={}, tensors=0) for name in states)
        where = Path("the model in this process")
        found = handover.HandOver(
            where, {"name": task.name, "index": task.index}, kept, {}, base_facts(trainer), held=states
        )
    setattr(model, LEFT, Left(found, _written(model)))


def _written(model: Any) -> tuple[int, ...]:
    return tuple(p._version for p in model.parameters())


def left_with(model: Any, options: Any) -> Left | None:
    """Get what methods left with a model that was trained earlier in this process.

    Args:
        model: As given to the trainer, before it is touched.
        options: Where `predecessor` and `fresh_methods` are, or None.

    Returns:
        What was left; None if the model was not trained in this process, or another predecessor is given.

    Raises:
        HandOverError: If its weights were changed since.
    """
    left = getattr(model, LEFT, None)
    if left is None or getattr(options, "predecessor", None) or getattr(options, "fresh_methods", False):
        return None
    if left.found is not None and left.weights != _written(model):
        raise handover.HandOverError(
            f"The weights of this model were changed since task {left.found.task.get('name')!r} ended in this process, and what "
            f"its methods ({', '.join(left.found.names)}) learned may not be valid for them. Give the folder that belongs to the "
            f"weights, predecessor=folder in ContinualConfig or ContinualCallback, or start without what was learned: "
            f"{FRESH}."
        )
    return left


def open_predecessor(trainer: LiveTrainer, source: str | None, left: Left | None = None) -> handover.HandOver | None:
    """Open what the previous task left for this run's methods.

    Args:
        trainer: The trainer, set up.
        source: Folder or Hub id of the weights that training starts from.
        left: What methods left with a model of this process; it takes precedence over the weights it was loaded from.

    Returns:
        The list of what was left, no tensor read; None if there is nothing, or it is not wanted.

    Raises:
        HandOverError: If it is damaged, belongs to different weights, another base or other methods.
    """
    options = trainer.options
    source = getattr(options, "predecessor", None) or source
    if not trainer.methods:
        if source is not None and (Path(source) / handover.FOLDER / handover.MANIFEST).is_file():
            logger.warning(
                "%s holds what methods of an earlier task learned; this run has no methods and ignores it.", source
            )
        return None
    if getattr(options, "fresh_methods", False):
        logger.info("The methods start without what an earlier task left (fresh_methods=True).")
        return None
    if left is not None:
        return _checked(trainer, left.found)
    if is_unfinished(source):
        logger.warning(
            "%s is a checkpoint of an unfinished task; its methods left nothing for another task. To finish that "
            "task, resume it: trainer.train(resume_from_checkpoint=%r).", source, source,
        )  # fmt: skip
        return None
    revision = (getattr(options, "model_init_kwargs", None) or {}).get("revision")
    from_first(lambda: find_predecessor(source, revision) and None)  # one process reads the weights to check them
    return _checked(trainer, find_predecessor(source, revision, check=False))


def _checked(trainer: LiveTrainer, found: handover.HandOver | None) -> handover.HandOver | None:
    if found is not None:
        _check_methods(trainer, found)
        _check_base(trainer, found)
        logger.info(
            "%s: loading what %s learned in task %r.",
            found.folder, ", ".join(found.names), found.task.get("name"),
        )  # fmt: skip
    return found


def _check_methods(trainer: LiveTrainer, found: handover.HandOver) -> None:
    left = [(kept.name, kept.kind, f", {kept.bytes:,} bytes") for kept in found.methods]
    try:
        check_heirs(left, trainer.methods, f"{found.folder}, the model of task {found.task.get('name')!r},")
    except ValueError as error:
        raise handover.HandOverError(str(error)) from None


def _check_base(trainer: LiveTrainer, found: handover.HandOver) -> None:
    then, now = found.base, base_facts(trainer)
    if then.get("sample") is None or now.get("sample") is None or then["sample"] == now["sample"]:
        return
    left = [method for method in trainer.methods if method.name in found.names]
    if then.get("beside") is not None and then["beside"] == now["beside"]:
        # All weights without adapters are unchanged: the adapters were merged into the base.
        if all(method.outlives_merging for method in left):
            logger.info("%s: its adapter is part of the base %s now.", found.folder, now.get("name") or "model")
            return
    raise handover.HandOverError(
        f"{found.folder} was trained on the base {then.get('name') or 'model'!r}, and this run's base "
        f"{now.get('name') or 'model'!r} has different weights: what its methods learned is not valid there. "
        f"Load the same base, or start without what was learned: {FRESH}."
    )


def base_facts(trainer: LiveTrainer) -> dict[str, Any]:
    """Name and a few values of the weights without the adapter; empty for a full model, which is its own base."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, PeftModel):
        return {}
    name = getattr(model.get_base_model().config, "name_or_path", None)
    named = Path(name).name if name and Path(name).is_dir() else name
    return {"name": named, "sample": base_sample(model), "beside": base_sample(model, adapted=False)}


def before_training(trainer: LiveTrainer) -> None:
    """Hand the methods what the previous task left, let them prepare, and edit the task's rows."""
    run, methods = trainer.run, trainer.methods
    if (found := trainer.predecessor) is not None:
        for method in methods:
            if state := handover.state_of(found, method.name):
                method.load_task_state(state, run)
    for method in methods.at("prepare"):
        method.prepare(run)
    trainer.mix_prepared_rows()
    if editing := methods.at("edit_rows"):
        trainer.rows_as_given = trainer.rows_as_given or trainer.train_dataset
        rows = trainer.rows_as_given
        for method in editing:
            rows = _edited(method, run, rows)
        trainer.train_dataset = rows


def _edited(method: Any, run: Any, rows: Any) -> Dataset:
    name = type(method).__name__
    if not isinstance(rows, Dataset):
        raise ValueError(
            f"{name} edits the task's rows before training, but the rows are a stream, which has no end. Load them as a "
            f"Dataset, or drop the method."
        )
    edited = method.edit_rows(run, rows)
    if not isinstance(edited, Dataset) or not {"input_ids", "labels"} <= set(edited.column_names) or not len(edited):
        shape = f"{len(edited)} rows with {edited.column_names}" if isinstance(edited, Dataset) else repr(type(edited))
        raise ValueError(
            f"{name}.edit_rows must return a Dataset of at least one row with input_ids and labels, but it returned {shape}."
        )
    return edited


def task_states(trainer: LiveTrainer) -> dict[str, dict[str, Any]]:
    """The state that each method leaves, after its `end_task`; all processes must call this together."""
    return {m.name: dict(m.task_state(trainer.run)) for m in trainer.methods if overrides(type(m), "task_state")}


def stage(trainer: LiveTrainer, folder: Path) -> bool:
    """Write what methods leave to a staging folder, before the model is saved into the folder.

    Args:
        trainer: The trainer.
        folder: The model's folder.

    Returns:
        Whether there is something to move into place afterwards with `handover.commit`; on the main process.
    """
    states = {name: state for name, state in (trainer.task_states or {}).items() if state}
    if not states:
        handover.clear(folder)
        return False
    task = trainer.run.task
    described = [(name, kind, safe(options)) for name, kind, options in trainer.methods.kinds()]  # it may be published
    handover.stage(
        folder, states, described, {"name": task.name, "index": task.index}, base_facts(trainer),
        {method.name: method.leaves for method in trainer.methods},
        [method.name for method in trainer.methods if method.keeps_rows],
    )  # fmt: skip
    return True
