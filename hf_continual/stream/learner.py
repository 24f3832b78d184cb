"""Trains and scores the tasks of a plan: a fresh trainer per task, a fresh load per model that is scored."""

from __future__ import annotations

import gc
import inspect
import logging
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback

from hf_continual.atomic_files import write_lines
from hf_continual.data.handover import bring_along
from hf_continual.evaluation.files import SCORES
from hf_continual.evaluation.result import Scored
from hf_continual.inference.kinds import for_task
from hf_continual.merging.merge import merge
from hf_continual.merging.methods.base import MergeMethod
from hf_continual.merging.methods.table import merge_class
from hf_continual.named import imported
from hf_continual.plain import hyper_parameters, is_plain
from hf_continual.stream.curve import CURVE, Curve
from hf_continual.stream.folders import MEMORY, check_unchanged, wait
from hf_continual.stream.models import is_adapter, load_finished, load_for_training
from hf_continual.stream.prepared import Prepared
from hf_continual.stream.scores import keep_error
from hf_continual.tasks import Task
from hf_continual.trainer.facts import cost_of
from hf_continual.trainer.state import last_complete_checkpoint
from hf_continual.trainer.trainer import ContinualTrainer

logger = logging.getLogger(__name__)

BEFORE_MERGE = "trained"


class PlanLearner:
    """Implements `hf_continual.stream.folders.Learner` for a plan.

    Args:
        prepared: The prepared plan.
        output_dir: The run's folder.
    """

    def __init__(self, prepared: Prepared, output_dir: Path) -> None:
        self.prepared, self.plan, self.output_dir = prepared, prepared.plan, output_dir

    def columns(self, task: Task | None) -> Sequence[Task]:
        """Tasks by the plan's rule, then the gauges."""
        gauges = [Task(name, test=rows) for name, rows in self.prepared.gauges.items()]
        return [*self.prepared.columns_after(task), *gauges]

    def learn(self, task: Task, parent: Path | None, folder: Path) -> dict[str, Any]:
        """Train, merge if the plan asks for it, and record what is kept for later tasks; see `Learner.learn`."""
        merge = self.plan.merge
        start = None if merge is not None and merge.start == "base" else parent
        goal = folder if merge is None else folder / BEFORE_MERGE
        facts = self.train(task, start, folder, goal)
        _free()
        if merge is not None and PartialState().is_main_process:
            self._merge(task, parent, folder)
        if (memory := self.prepared.memory) is not None and PartialState().is_main_process:
            write_lines(folder / MEMORY, memory.after[task.name])
        wait()
        return facts

    def train(self, task: Task, parent: Path | None, folder: Path, goal: Path) -> dict[str, Any]:
        """Train a task and save its model.

        Args:
            task: The task.
            parent: Folder of the previous task, None for the plan's model.
            folder: Folder of checkpoints, also to resume from.
            goal: Folder to save the model in.

        Returns:
            Facts about the training.
        """
        # New adapters are drawn before the trainer sets its seed: the draw must not depend on earlier ones.
        set_seed(self.plan.seed)
        model, peft_config = load_for_training(self.plan, parent)
        args = self.prepared.config(task, folder)
        before = parent or self.plan.model.adapter
        args.predecessor = None if before is None else str(before)
        trainer = ContinualTrainer(
            model=model,
            args=args,
            train_dataset=task.train,
            processing_class=self.prepared.tokenizer,
            peft_config=peft_config,
            methods=self.prepared.methods(task),
        )
        if args.disable_tqdm and args.logging_strategy == "no":
            trainer.remove_callback(PrinterCallback)
        if steps := self.plan.tasks[task.index].curve:
            # After the methods' callback: the model is scored as the step left it.
            trainer.add_callback(Curve(trainer, steps, self.columns(task), self.prepared, folder / CURVE))
        checkpoint = last_complete_checkpoint(folder)
        logger.info("%s: training%s", task.name, f" from {Path(checkpoint).name}" if checkpoint else "")
        trainer.train(resume_from_checkpoint=checkpoint)
        facts = {
            "name": task.name,
            "index": task.index,
            "parent": None if parent is None else parent.name,
            "steps": trainer.state.global_step,
            "methods": trainer.methods.describe() if all(is_plain(m.describe()) for m in trainer.methods) else None,
            "cost": cost_of(trainer),
        }
        trainer.save_model(str(goal))
        wait()
        if PartialState().is_main_process:
            (goal / "training_args.bin").unlink(missing_ok=True)
        trainer.accelerator.free_memory()
        return facts

    def _merge(self, task: Task, parent: Path | None, folder: Path) -> None:
        """Merge the task's model with the earlier ones, into the task's folder; on the main process only."""
        merge = self.plan.merge
        assert merge is not None
        trained = folder / BEFORE_MERGE
        if merge.start == "merged":
            models = [] if parent is None else [parent]
        else:
            earlier = [self.output_dir / t.folder for t in self.prepared.stream.lineage(task)[:-1]]
            for model in earlier:
                check_unchanged(model)
            models = [model / BEFORE_MERGE for model in earlier]
        if not models:
            logger.info("%s: first of its line, so there is nothing to merge it with", task.name)
            _copy_files(trained, folder)
            bring_along(trained, folder)
            return
        merged = folder / "merged"
        if merged.is_dir():
            shutil.rmtree(merged)
        logger.info("%s: merging %s", task.name, ", ".join(str(m) for m in [*models, trained]))
        function, wanted = find_merge(merge.function)
        offered = {"base": self.plan.model.path, "task": task, "calibration": task.train}
        if "importance" not in merge.options:  # which also covers the importance to the new task
            offered["calibration_new"] = task.train
        given = {k: v for k, v in offered.items() if k in wanted and k not in merge.options}
        function([str(m) for m in [*models, trained]], str(merged), **given, **merge.options)
        if not any(merged.glob("*.safetensors")):
            raise RuntimeError(
                f"the merge {merge.function!r} wrote no safetensors file to {merged}. It must write a model or an adapter "
                f"into the folder that is its second argument."
            )
        _copy_files(merged, folder)
        bring_along(trained, folder)
        shutil.rmtree(merged)

    def score(self, folder: Path | None, tasks: Sequence[Task], done: Callable[[str, Scored], None]) -> None:
        """Load once and score each task, its rows split over the processes; see `Learner.score`."""
        where = folder or self.output_dir / "base"
        logger.info("scoring %s on %s", where.name.removesuffix(".partial"), ", ".join(t.name for t in tasks))
        model = load_finished(self.plan, folder)
        try:
            for task in tasks:
                try:
                    scored = self._scored(model, task)
                except Exception as error:
                    if PartialState().is_main_process:
                        keep_error(where, task.name, "", f"{type(error).__name__}: {error}")
                    raise RuntimeError(
                        f"scoring {task.name!r} with {where} failed: {type(error).__name__}: {error}. It is recorded as "
                        f"ERROR in {where / SCORES}; run the plan again to resume from there."
                    ) from error
                done(task.name, scored)
        finally:
            del model
            _free()

    def _scored(self, model: Any, task: Task) -> Scored:
        scorer, state = self.prepared.scorers[task.name], PartialState()
        if task.test is None:
            with for_task(model, task.name):
                return scorer(model, self.prepared.tokenizer, None)
        mine = task.test
        if state.num_processes > 1:
            mine = task.test.select(range(state.process_index, len(task.test), state.num_processes))
        with for_task(model, task.name):
            own = scorer(model, self.prepared.tokenizer, mine)
        if state.num_processes == 1:
            return own
        parts = gather_object([list(own.rows)])
        rows = [parts[i % state.num_processes][i // state.num_processes] for i in range(len(task.test))]
        return Scored(rows, own.protocol, own.lower_is_better)


def find_merge(name: Any) -> tuple[Callable[..., Any], set[str]]:
    """Find a merge: a function, ``package.module:function``, a name in the table of merges, or your own `MergeMethod`.

    Args:
        name: One of these.

    Returns:
        A function of models and output folder, and the names of its other parameters.

    Raises:
        ValueError: If it cannot be imported.
    """
    found = name
    if ":" in str(name) and not callable(name):
        try:
            found = imported(str(name))
        except ImportError as error:
            raise ValueError(f"the merge {name!r} cannot be imported: {error}.") from error
    if isinstance(found, type) and issubclass(found, MergeMethod):
        found = f"{found.__module__}:{found.__qualname__}"
    if not isinstance(found, str):
        return found, set(inspect.signature(found).parameters)
    return partial(merge, found), {"base", *hyper_parameters(merge_class(found))}


def _copy_files(source: Path, target: Path) -> None:
    if is_adapter(source) != is_adapter(target) and is_adapter(target):
        raise RuntimeError(f"{target} already holds an adapter.")
    for file in source.iterdir():
        if file.is_file():
            shutil.copy2(file, target / file.name)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
