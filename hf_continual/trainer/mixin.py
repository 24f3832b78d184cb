"""The part of a trainer with methods that is the same on every trainer of transformers: hooks, checkpoints and hand-over.

`ContinualTrainer` puts it before TRL's SFTTrainer, `ContinualMixin` and `ContinualCallback` before any other. Without
methods each override only delegates, so that a trainer is bit for bit what it is without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import DynamoBackend, is_compiled_module
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_continual.data import handover
from hf_continual.data.kept import weight_files
from hf_continual.disk import writing
from hf_continual.methods.compose import kind_of as kind_of_method
from hf_continual.trainer import adapters, checks, hand_over, run_lock, state, whole
from hf_continual.trainer.hooks import MethodHooks
from hf_continual.trainer.ledger import Ledger
from hf_continual.trainer.live import LiveTrainer
from hf_continual.trainer.optimizer import check_live_optimizer, parameter_groups

if TYPE_CHECKING:
    from hf_continual.trainer.mixer import ReplayMixer
    from hf_continual.trainer.trainer_run import TrainerRun


class MethodsMixin(LiveTrainer):
    """What methods do to a trainer, wherever that takes only what every trainer of transformers has."""

    def begin_without_methods(self, options: Any) -> None:
        """Set the attributes of a trainer whose methods are not set up yet.

        Args:
            options: Where `task_name`, `predecessor` and `fresh_methods` are.
        """
        self.options = options
        self.task_states, self.rows_as_given, self.predecessor = None, None, None
        self.mixer, self.tap, self.listeners = None, None, []
        self.ledger = Ledger()
        self.row_digests, self.step_batches = {}, []

    def set_up_methods(self, run: TrainerRun) -> None:
        """Check that the methods can run here, let them change the model, and call them from now on.

        Args:
            run: What the methods see of this trainer, which has no optimizer yet, or one that was given.
        """
        for method in self.methods:
            method.renew()
        self.run = run
        self.check_setup()
        self.mixer = self.rows_of_methods()
        for method in self.methods:
            method.prepare_model(run.model, run.task)
        self.given_optimizer = self.optimizer
        # The loop sets it at each step; a run resumed after its last step has none, and methods still end the task.
        self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps
        if self.optimizer is not None:
            check_live_optimizer(self)
        self.listeners = self.methods.at("after_forward")
        self.add_callback(MethodHooks(self))

    def check_setup(self) -> None:
        """Refuse methods that do not fit the training setup."""
        checks.check_trainer(self)

    def rows_of_methods(self) -> ReplayMixer | None:
        """The rows that methods add to the task's; None if there are none."""
        raise NotImplementedError

    def replay_totals(self) -> np.ndarray | None:
        """Task tokens, replayed tokens and rows drawn, over all processes; None where no rows are added."""
        return None

    def mix_prepared_rows(self) -> None:
        """Add rows that methods have made in `prepare`, where rows can be added."""

    def is_compiled(self) -> bool:
        """Whether the forward pass is compiled."""
        plugin: Any = self.accelerator.state.dynamo_plugin
        return plugin.backend != DynamoBackend.NO or self.args.torch_compile or is_compiled_module(self.model)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer of the method that supplies one, else the trainer's."""
        method = self.methods.optimizing
        choice = method.optimizer(self.run) if method and self.optimizer is None else None
        if choice is None:
            return super().create_optimizer(*args, **kwargs)
        given = args[0] if args else kwargs.get("model")
        model = self.model if given is None else given
        groups = parameter_groups(model, choice, self.get_decay_parameter_names(model), self.args.weight_decay)
        self.optimizer = choice.cls(groups, **choice.kwargs)
        return self.optimizer

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's loss; methods are told that the micro-batch went forward."""
        loss = super().compute_loss(*args, **kwargs)
        if self.methods and self.model.training and not self.is_aside:
            for method in self.listeners:
                method.after_forward(self.run)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's log with the values of the methods."""
        if self.methods and self.model.training:
            if "loss" in logs:  # a step's log, not the summary at the end
                self.ledger.add_logged(self.methods.at("logged"), self.run)
            logs.update(self.ledger.flush(self.accelerator))
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.methods:
            self._write_state(output_dir, {m.name: m.state_dict(self.run) for m in self.methods})
        super()._save_optimizer_and_scheduler(output_dir)

    def _write_state(self, output_dir: str, states: dict[str, dict[str, Any]], not_saved: Sequence[str] = ()) -> None:
        totals = self.replay_totals()
        if self.args.should_save:
            run = {
                "methods": self.methods.describe(),
                "replay": None if totals is None else totals.tolist(),
                "rows": self.row_digests,
                **({"not_saved": list(not_saved)} if not_saved else {}),
            }
            state.write_state(Path(output_dir), run, states)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.methods:
            # Every process has written its last file. All must be on disk before an older checkpoint is removed.
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                whole.sync(Path(output_dir))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        if not self.methods:
            super()._save_checkpoint(model, trial)
            return
        folder = Path(self._get_output_dir(trial=trial))
        with writing(folder, partial(self._after_a_full_disk, folder)):
            super()._save_checkpoint(model, trial)
            self._complete(folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

    def _after_a_full_disk(self, folder: Path) -> str:
        """Say what is saved, and what to do."""
        whole_one = state.last_complete_checkpoint(folder, everywhere=False) if folder.is_dir() else None
        keep = "Free space there, or keep fewer checkpoints (save_total_limit, save_only_model)"
        if whole_one is None:
            return f"No checkpoint is complete yet. {keep}, and train again."
        return f"{whole_one} is complete. {keep}; then train(resume_from_checkpoint=True) resumes from it."

    def _complete(self, checkpoint: Path) -> None:
        """Write the files that make a checkpoint complete."""
        if self.args.save_only_model:
            states = {m.name: m.state_dict(self.run) for m in self.methods}
            kept = {m.name: states[m.name] for m in self.methods if m.state_with_model}
            self._write_state(str(checkpoint), kept, [n for n, s in states.items() if s and n not in kept])
        if self.args.should_save:
            whole.write_marker(checkpoint)

    def save_with_methods(self, folder: str) -> None:
        """Save the model with what its methods leave for the next task."""
        staged = self.args.should_save and hand_over.stage(self, Path(folder))
        self.write_model(folder)
        if staged:
            handover.commit(Path(folder))
        self.accelerator.wait_for_everyone()

    def leave_in(self, folder: str | Path) -> None:
        """Write what the methods leave into the folder of a model that was saved by other means than `save_model`.

        Args:
            folder: Where the model was saved.

        Raises:
            ValueError: If the task has not ended, or there are no weights.
        """
        if self.task_states is None:
            raise ValueError(f"Methods have left nothing for {folder} yet: they do when training ends. Train first.")
        if not weight_files(Path(folder)):
            raise ValueError(
                f"{folder} has no weights (*.safetensors) that what methods learned could belong to. Save the model there first."
            )
        if self.args.should_save and hand_over.stage(self, Path(folder)):
            handover.commit(Path(folder))

    def write_model(self, folder: str) -> None:
        """Write the model's own files."""
        super().save_model(folder, _internal_call=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        live = self.accelerator.unwrap_model(self.model)
        with adapters.kept_active(live) if self.methods or adapters.is_stacked(live) else nullcontext():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self.methods or (run := state.read_run(Path(checkpoint))) is None:
            return
        state.check_same_rows(Path(checkpoint), self.row_digests, [m.name for m in self.methods.at("replay")])
        if self.mixer is not None:
            self.mixer.resume(np.asarray(run["replay"], dtype=np.int64))
        for method in self.methods:
            method.load_state_dict(state.read_state(Path(checkpoint), method.name), self.run)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """An epoch, unless the run was resumed from its last checkpoint: transformers would make one more step within an epoch."""
        if 0 < self.state.max_steps <= self.state.global_step:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def stoppable(self) -> AbstractContextManager[None]:
        """The context of a training that can be asked to stop; here signals are the caller's."""
        return nullcontext()

    def after_training(self) -> None:
        """What is left to do once the task is learned."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the trainer does, but True resumes from the newest complete checkpoint, and the folder is locked."""
        resume_from_checkpoint = self._checked_checkpoint(resume_from_checkpoint)
        self.task_states = None
        with run_lock.held(Path(self.args.output_dir)) if self.methods else nullcontext(), self.stoppable():
            try:
                if self.methods:
                    hand_over.before_training(self)
                result = super().train(resume_from_checkpoint, *args, **kwargs)
                self.after_training()
                hand_over.leave_with_model(self)
                return result
            finally:  # an error or Ctrl-C must not leave hooks on a model that is still used
                for method in self.methods:
                    method.release()
                if self.tap is not None:
                    self.tap.remove()

    def _checked_checkpoint(self, asked: str | bool | None) -> str | bool | None:
        """The checkpoint to resume from, refused if it is incomplete or of another run."""
        if asked is True:
            asked = state.last_complete_checkpoint(self.args.output_dir)
            if asked is None:
                raise ValueError(
                    f"No complete checkpoint in {self.args.output_dir}: nothing to resume. Train without "
                    f"resume_from_checkpoint, or set save_strategy and save_steps so that checkpoints are written."
                )
        if asked:
            checkpoint = Path(asked)
            if self.methods or state.read_run(checkpoint):
                state.check_whole(checkpoint)
            places = {kind_of_method(type(m)): m.places for m in self.methods}
            state.check_same_methods(checkpoint, self.methods.describe(), places)
        return asked
