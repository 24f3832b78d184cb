"""ContinualCallback: methods on a trainer that someone else builds."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from hf_continual.trainer.any_trainer import ContinualMixin, TaskOptions, check_methods, read_methods
from hf_continual.trainer.mixin import MethodsMixin


class ContinualCallback(TrainerCallback):
    """Methods against forgetting on any trainer of transformers, given as one of its callbacks.

    A callback is told of steps, but it can neither supply an optimizer nor write into a checkpoint, and it is not told
    which trainer calls it. So it looks up the trainer that calls it, as soon as that is built, and makes it one with
    `ContinualMixin`: the methods, and what they may be, are the same.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[ContinualCallback([RecAdam(pull=0.01)])])
        >>> trainer = ContinualCallback([RecAdam(pull=0.01)]).attach(built)

    Args:
        methods: As in `ContinualMixin`; so are the others.
        task_name: See `ContinualMixin`.
        task_index: See `ContinualMixin`.
        predecessor: See `ContinualMixin`.
        fresh_methods: See `ContinualMixin`.

    Raises:
        TypeError: If something has the wrong type.
        ValueError: If `methods` is empty, or a method needs a ContinualTrainer.
    """

    def __init__(
        self,
        methods: Any,
        *,
        task_name: str = "task",
        task_index: int = 0,
        predecessor: str | None = None,
        fresh_methods: bool = False,
    ) -> None:
        self.methods = read_methods(methods)
        check_methods(self.methods, "a trainer with ContinualCallback")
        self.options = TaskOptions(task_name, task_index, predecessor, fresh_methods)
        self.trainer: Any = None

    def attach(self, trainer: Any) -> Any:
        """Give a trainer that was built, and has not trained yet, the methods.

        Args:
            trainer: A trainer of transformers, or of a library that builds on it.

        Returns:
            The same trainer.

        Raises:
            TypeError: If it is not a trainer.
            ValueError: If it has methods already, trains, or a method cannot run on it.
        """
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"ContinualCallback.attach needs a trainer of transformers, got {type(trainer).__name__} ({trainer!r:.100}). Give the "
                f"object that you call train() of."
            )
        if isinstance(trainer, MethodsMixin) and trainer.methods:
            names = ", ".join(type(m).__name__ for m in trainer.methods)
            raise ValueError(
                f"This {type(trainer).__name__} has methods already ({names}): their hooks would be called twice. Put all methods into "
                f"one list."
            )
        if isinstance(trainer, MethodsMixin) and not isinstance(trainer, ContinualMixin):
            raise ValueError(
                f"{type(trainer).__name__} takes methods itself, and more of them: {type(trainer).__name__}(..., methods=[...])."
            )
        if trainer.is_in_train:
            raise ValueError(
                "This trainer trains already: its optimizer and its wrapped model are there, and methods come before both. Attach "
                "the callback before train() is called."
            )
        live: Any = trainer
        before = type(trainer)
        if not isinstance(trainer, ContinualMixin):
            live.__class__ = with_methods(before)
        try:
            live.take_methods(self.methods, self.options)
        except BaseException:
            live.__class__ = before
            raise
        self.trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return trainer

    def leave_in(self, folder: str | Path) -> None:
        """Write what the methods leave for the next task, where the model was not saved by the trainer's `save_model`.

        Args:
            folder: Where the model was saved.

        Raises:
            ValueError: If the callback has no trainer yet, the task has not ended, or the folder has no weights.
        """
        if self.trainer is None:
            raise ValueError("This ContinualCallback has no trainer yet: give it to one and train first.")
        self.trainer.leave_in(folder)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer that it was given to, as soon as that is built."""
        self.attach(_calling(self))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse to train without the methods."""
        trainer = _calling(self)
        if trainer is not self.trainer:
            raise RuntimeError(
                f"ContinualCallback was added to a {type(trainer).__name__} that was built before: by now its optimizer is there and a "
                f"checkpoint is loaded, and methods come before both. Write callback.attach(trainer) instead of "
                f"trainer.add_callback(callback), or give it to the trainer as it is built: callbacks=[callback]."
            )


@functools.cache
def with_methods(trainer_class: type) -> type:
    """The same class of trainers with `ContinualMixin` before it, under the same name.

    Args:
        trainer_class: A class of trainers.

    Returns:
        The new class.
    """
    same = {key: getattr(trainer_class, key) for key in ("__module__", "__qualname__", "__doc__")}
    return type(trainer_class.__name__, (ContinualMixin, trainer_class), same)


def _calling(callback: TrainerCallback) -> Any:
    """The trainer that calls a callback now: the nearest on the stack that has it, since events do not say."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back
    raise RuntimeError(
        "ContinualCallback was called by something that is not a trainer of transformers, and has no trainer to work on. Give it to a "
        "trainer: Trainer(..., callbacks=[callback]), or callback.attach(trainer)."
    )
