"""ContinualMixin: methods on any trainer of transformers, as far as they need nothing that only ContinualTrainer has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_continual.methods.base import Method
from hf_continual.methods.compose import Methods, hooks, overrides
from hf_continual.methods.table import TABLE, build_methods, method_class
from hf_continual.tasks import Task
from hf_continual.trainer import checks, hand_over
from hf_continual.trainer.hooks import MethodHooks
from hf_continual.trainer.mixin import MethodsMixin
from hf_continual.trainer.parallelism import check_parallelism
from hf_continual.trainer.predecessor import named_by
from hf_continual.trainer.trainer_run import TrainerRun

# Hook that a method overrides -> why it cannot be called on a trainer that is not known.
NEEDS = {
    "adapter": "puts its own modules onto the model before the trainer is built",
    "edit_rows": "relabels the task's rows, and a trainer's data collator may make its own labels",
    "begin_step": "makes extra passes over each step's micro-batches, in which rows of earlier tasks are mixed",
}
_ROWS = "mixes its rows into the task's batches, and this trainer does not tell how it makes tokens and batches of rows"
_FORWARD = "reads the loss of each token in the forward pass, and this trainer does not tell how it computes its loss"
_WATCHES = (
    "measures the loss on rows that are not the task's, and this trainer does not tell how it makes tokens of rows"
)


@dataclass(frozen=True)
class TaskOptions:
    """What `ContinualConfig` says of a task, for trainers with other training arguments; described at `ContinualMixin`."""

    task_name: str = "task"
    task_index: int = 0
    predecessor: str | None = None
    fresh_methods: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.task_index, bool) or not isinstance(self.task_index, int) or self.task_index < 0:
            raise ValueError(
                f"task_index={self.task_index!r} must be a whole number, 0 or more: tasks are counted from 0."
            )


def why_not(method: Method) -> str | None:
    """Why a method cannot run on any trainer, as part of a sentence; None if it can.

    Args:
        method: The method, whose hyper-parameters may decide.

    Returns:
        What it does that takes a ContinualTrainer.
    """
    if overrides(type(method), "adapter"):
        return NEEDS["adapter"]
    if method.watches:
        return _WATCHES
    if method.added_rows() is not None or method.makes_rows():
        return _ROWS
    if method.reads_forward() or method.taps:
        return _FORWARD
    return next((why for call, why in NEEDS.items() if overrides(type(method), call)), None)


def read_methods(methods: Any) -> Methods:
    """The methods of a run, given as objects or as data.

    Args:
        methods: A list of methods, or what `ContinualConfig(methods=...)` takes.

    Returns:
        The methods, checked to fit together.

    Raises:
        TypeError: If it is neither.
        ValueError: If a name or hyper-parameter is unknown, or there are no methods.
    """
    listed = list(methods) if isinstance(methods, Iterable) and not isinstance(methods, str | Mapping) else methods
    as_data = isinstance(listed, str | Mapping) or (
        isinstance(listed, list) and any(isinstance(m, str | Mapping) for m in listed)
    )
    built = Methods(build_methods(listed) if as_data else listed)
    if not built:
        raise ValueError(
            f"methods={methods!r} holds no method: there is nothing to do. Give at least one of {', '.join(TABLE)}."
        )
    return built


def check_methods(methods: Methods, trainer: str) -> None:
    """Refuse methods that need what only ContinualTrainer has.

    Args:
        methods: The methods.
        trainer: Name of the trainer's class, for the message.

    Raises:
        ValueError: Naming the method and the reason.
    """
    for method in methods:
        if (why := why_not(method)) is not None:
            name = type(method).__name__
            raise ValueError(
                f"{name} on {trainer}: it {why}. Train with ContinualTrainer(..., methods=[{name}(...)]), or drop {name}."
            )


class ContinualMixin(MethodsMixin):
    """Methods against forgetting on any trainer of transformers: put it before the trainer's class.

    Everything that happens on the model, the optimizer, gradients and weights works, with checkpoints that resume and
    a hand-over to the next task in `save_model`. `ContinualTrainer` also mixes in rows and adds loss terms.

    Example:
        >>> class MyTrainer(ContinualMixin, Trainer): ...
        >>> trainer = MyTrainer(model, args, train_dataset=rows, methods=[RecAdam(pull=0.01)])

    Args:
        *args: As in the trainer's class.
        methods: The methods in the order in which they edit gradients and weights, as objects or as data; None is the
            trainer's class as it is.
        task_name: Name of the task in what is handed over.
        task_index: Place of the task in its sequence, counted from 0.
        predecessor: Folder or Hub id of the previous task, if the model does not tell: a full model that was loaded from a
            folder tells, an adapter does not.
        fresh_methods: Start without what the methods of the previous task left.
        **kwargs: As in the trainer's class.

    Raises:
        TypeError: If something has the wrong type.
        ValueError: If a method cannot run on this trainer, or does not fit the model or the training setup.
    """

    def __init__(
        self,
        *args: Any,
        methods: Any = None,
        task_name: str = "task",
        task_index: int = 0,
        predecessor: str | None = None,
        fresh_methods: bool = False,
        **kwargs: Any,
    ) -> None:
        options = TaskOptions(task_name, task_index, predecessor, fresh_methods)
        found = None if methods is None else read_methods(methods)
        self.methods = Methods(())
        self.begin_without_methods(options)
        super().__init__(*args, **kwargs)
        if found is not None:
            self.take_methods(found, options)

    def take_methods(self, methods: Methods, options: TaskOptions) -> None:
        """Give a trainer that was built its methods.

        Args:
            methods: The methods.
            options: Of the task.

        Raises:
            ValueError: If one cannot run here.
        """
        kind = type(self).__name__
        check_methods(methods, kind)
        if self.model_init is not None:
            raise ValueError(
                f"{kind} builds a new model with model_init each time it trains, and methods change and remember the model that is "
                f"there when they are set up. Give the model itself: {kind}(model=model_init(), ...)."
            )
        checks.check_arguments(
            methods, self.args, None, (self.optimizer, None), getattr(self, "optimizer_cls_and_kwargs", None)
        )
        left = hand_over.left_with(self.model, options)
        self.methods = Methods(())
        self.begin_without_methods(options)
        self.methods = methods
        try:
            self.set_up_methods(TrainerRun(self, Task(options.task_name, options.task_index)))
            self.predecessor = hand_over.open_predecessor(self, named_by(self.run.model), left)
        except BaseException:  # the trainer may be used without them
            self.methods = Methods(())
            self.remove_callback(MethodHooks)
            raise

    def check_setup(self) -> None:
        """Refuse a model that is not trained, and methods that do not fit the parallelism."""
        checks.check_trainable(self.run.model)
        check_parallelism(self)

    def rows_of_methods(self) -> None:
        """None: the methods only prepare the rows that they use themselves."""
        for method in self.methods.at("replay"):
            method.replay(self.run)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as the trainer does, with what its methods leave for the next task."""
        if _internal_call or not self.methods:
            super().save_model(output_dir, _internal_call)
            return
        self.save_with_methods(output_dir or self.args.output_dir)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)


def works_anywhere(kind: str) -> bool:
    """Whether a method of the table runs on any trainer, for the table in recipes/neighbours.

    Args:
        kind: A key of the table of methods.

    Returns:
        As its class says; a method whose hyper-parameters decide counts with its own defaults.
    """
    cls = method_class(kind)
    if any(overrides(cls, call) for call in NEEDS):
        return False
    return not any(
        overrides(cls, call) for call in ("added_rows", "makes_rows", "reads_forward", "loss_terms", "weigh_tokens")
    )


def table() -> list[str]:
    """The table in Markdown: what each method does, and whether it runs on any trainer."""
    lines = ["| method | hooks | any trainer | ContinualTrainer |", "|---|---|---|---|"]
    for kind in TABLE:
        cls = method_class(kind)
        given = "yes; rows must have `input_ids` and `labels`" if overrides(cls, "replay") else "yes"
        lines.append(f"| `{kind}` | {', '.join(hooks(cls))} | {given if works_anywhere(kind) else '-'} | yes |")
    return lines
