"""Between tasks: what methods take over when training starts, and leave when the model of a finished task is saved."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from peft import PeftModel

from hf_continual.data import handover
from hf_continual.data.together import from_first
from hf_continual.methods.compose import overrides
from hf_continual.tensors.identity import base_sample
from hf_continual.trainer.start import find_predecessor, is_unfinished

if TYPE_CHECKING:
    from hf_continual.trainer.saving_trainer import SavingTrainer

logger = logging.getLogger(__name__)


def open_predecessor(trainer: SavingTrainer, source: str | None) -> handover.HandOver | None:
    """What the task before left for this run's methods.

    Args:
        trainer: The trainer, set up.
        source: Folder or Hub id of the weights that training starts from.

    Returns:
        The list of what was left, no tensor read; None where there is nothing, or it is not wanted.

    Raises:
        HandOverError: If it is damaged, belongs to other weights, another base or other methods.
    """
    args = trainer.args
    source = getattr(args, "predecessor", None) or source
    if not trainer.methods:
        if source is not None and (Path(source) / handover.FOLDER / handover.MANIFEST).is_file():
            logger.warning(
                "%s holds what methods of an earlier task learned; this run has no methods and leaves it.", source
            )
        return None
    if getattr(args, "fresh_methods", False):
        logger.info("The methods begin without what an earlier task left (fresh_methods=True).")
        return None
    if is_unfinished(source):
        logger.warning(
            "%s is a checkpoint of a task that has not ended; its methods left nothing for another task. To finish that "
            "task, resume it: trainer.train(resume_from_checkpoint=%r).", source, source,
        )  # fmt: skip
        return None
    revision = (getattr(args, "model_init_kwargs", None) or {}).get("revision")
    from_first(lambda: find_predecessor(source, revision) and None)  # one process reads the weights to check them
    found = find_predecessor(source, revision, check=False)
    if found is not None:
        _check_methods(trainer, found)
        _check_base(trainer, found)
        logger.info(
            "%s: taking over what %s learned in task %r.", source, ", ".join(found.names), found.task.get("name")
        )
    return found


def _check_methods(trainer: SavingTrainer, found: handover.HandOver) -> None:
    here = {name: kind for name, kind, _ in trainer.methods.kinds()}
    for kept in found.methods:
        if here.get(kept.name) != kept.kind:
            has = f"a {here[kept.name]!r} of that name" if kept.name in here else f"{', '.join(here)}"
            raise handover.HandOverError(
                f"{found.folder} comes with what method {kept.name!r} (a {kept.kind!r}, {kept.bytes:,} bytes) learned in task "
                f"{found.task.get('name')!r}, and this run has {has}: it would be lost. Give the run that method, or start "
                f"without what was learned: ContinualConfig(fresh_methods=True)."
            )


def _check_base(trainer: SavingTrainer, found: handover.HandOver) -> None:
    then, now = found.base.get("sample"), base_facts(trainer).get("sample")
    if then is not None and now is not None and then != now:
        raise handover.HandOverError(
            f"{found.folder} was trained on the base {found.base.get('name') or 'model'!r}, and this run's base "
            f"{base_facts(trainer).get('name') or 'model'!r} has other weights: what its methods learned does not hold there. "
            f"Load the same base, or start without what was learned: ContinualConfig(fresh_methods=True)."
        )


def base_facts(trainer: SavingTrainer) -> dict[str, Any]:
    """Name and a few values of the weights below an adapter; nothing for a full model, which is its own base."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, PeftModel):
        return {}
    name = getattr(model.get_base_model().config, "name_or_path", None)
    return {"name": Path(name).name if name and Path(name).is_dir() else name, "sample": base_sample(model)}


def before_training(trainer: SavingTrainer) -> None:
    """Hand the methods what the task before left, let them prepare, and edit the task's rows."""
    run, methods = trainer.run, trainer.methods
    if (found := trainer.predecessor) is not None:
        for method in methods:
            if state := handover.state_of(found, method.name):
                method.load_task_state(state, run)
    for method in methods.at("prepare"):
        method.prepare(run)
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
            f"{name} edits the task's rows before training, and the rows are a stream, which has no end. Load them as a "
            f"Dataset, or drop the method."
        )
    edited = method.edit_rows(run, rows)
    if not isinstance(edited, Dataset) or not {"input_ids", "labels"} <= set(edited.column_names) or not len(edited):
        shape = f"{len(edited)} rows with {edited.column_names}" if isinstance(edited, Dataset) else repr(type(edited))
        raise ValueError(
            f"{name}.edit_rows must return a Dataset of at least one row with input_ids and labels, it returned {shape}."
        )
    return edited


def task_states(trainer: SavingTrainer) -> dict[str, dict[str, Any]]:
    """What each method leaves, after its `end_task`; all processes must ask together."""
    return {m.name: dict(m.task_state(trainer.run)) for m in trainer.methods if overrides(type(m), "task_state")}


def stage(trainer: SavingTrainer, folder: Path) -> bool:
    """Write aside what methods leave, before the model is saved into the folder.

    Args:
        trainer: The trainer.
        folder: The model's folder.

    Returns:
        Whether there is something to put in place afterwards, with `handover.commit`. On the main process.
    """
    states = {name: state for name, state in (trainer.task_states or {}).items() if state}
    if not states:
        handover.clear(folder)
        return False
    task = trainer.run.task
    handover.stage(
        folder, states, trainer.methods.kinds(), {"name": task.name, "index": task.index}, base_facts(trainer)
    )
    return True
