"""A callback through which the trainer's loop calls the methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from hf_continual import private
from hf_continual.methods.compose import overrides
from hf_continual.trainer.hand_over import task_states
from hf_continual.trainer.optimizer import check_live_optimizer
from hf_continual.trainer.rates import remember_peaks

if TYPE_CHECKING:
    from hf_continual.trainer.live import LiveTrainer


class MethodHooks(TrainerCallback):
    """Calls begin, gradient, step and end hooks of a trainer's methods.

    A step that the gradient scaler skipped moved no weight, so the methods do not see it.

    Args:
        trainer: The trainer whose methods are called.
    """

    def __init__(self, trainer: LiveTrainer) -> None:
        self.trainer = trainer
        self.leading = trainer.methods.at("begin_step")
        # A method that moved the weights for the step's passes puts them back before others read them.
        editing = trainer.methods.at("edit_gradients")
        self.editing = sorted(editing, key=lambda method: not overrides(type(method), "begin_step"))
        self.after = trainer.methods.at("after_step")
        self.end = trainer.methods.at("end_step")
        self.watching = [method for method in self.end if method.watches]
        self.params: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called when everything is wrapped and loaded."""
        self.trainer.ended = None
        if self.trainer.mixer is not None and state.global_step == 0:
            self.trainer.mixer.reset()
        if self.trainer.listeners and self.trainer.is_compiled():
            # Code that was compiled earlier in this process, for another run, does not call new hooks.
            torch.compiler.reset()
        remember_peaks(self.trainer.run.optimizer)
        for method in self.trainer.methods:
            method.begin_task(self.trainer.run)
        check_live_optimizer(self.trainer)
        self.params = self.trainer.run.named_parameters() if self.editing else {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step's micro-batches are drawn."""
        for method in self.leading:
            batches = [private.on_device(self.trainer, batch) for batch in self.trainer.step_batches]
            method.begin_step(self.trainer.run, batches)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called when gradients are accumulated, reduced and clipped."""
        for method in self.editing:
            method.edit_gradients(self.params)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called when the weights have moved."""
        if self.after and not self.trainer.accelerator.optimizer_step_was_skipped:
            for method in self.after:
                method.after_step(self.trainer.run)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called when the step is counted, before log, evaluation and checkpoint."""
        if self.trainer.mixer is not None:
            self.trainer.mixer.settle()
        if self.end and not self.trainer.accelerator.optimizer_step_was_skipped:
            for method in self.end:
                if not method.watches:
                    method.end_step(self.trainer.run)
        if state.global_step >= state.max_steps and (
            apply := getattr(self.trainer.run.optimizer, "apply_owed_pulls", None)
        ):
            apply()  # before the last checkpoint
        for method in self.watching:
            method.end_step(self.trainer.run)
        if self.trainer.ended is not None:
            # A checkpoint of this step would be resumed and trained further; the one before gets here again.
            control.should_training_stop, control.should_save = True, False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called when the task is learned."""
        totals = self.trainer.replay_totals()
        if self.trainer.mixer is not None and totals is not None:
            self.trainer.mixer.report(totals.sum(axis=1))
        for method in self.trainer.methods:
            method.end_task(self.trainer.run)
        self.trainer.task_states = task_states(self.trainer)
