"""What a trainer writes into its checkpoints, which of them it resumes from, and that it is alone in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_continual.data import handover
from hf_continual.disk import writing
from hf_continual.methods.compose import kind_of
from hf_continual.trainer import adapters, hand_over, run_lock, state, stop, whole
from hf_continual.trainer.publishing_trainer import PublishingTrainer

if TYPE_CHECKING:
    from hf_continual.trainer.mixer import ReplayMixer
    from hf_continual.trainer.tap import ForwardTap


class SavingTrainer(PublishingTrainer):
    """The part of `ContinualTrainer` that saves and resumes."""

    mixer: ReplayMixer | None
    tap: ForwardTap | None
    row_digests: dict[str, str]
    run: Any
    task_states: dict[str, dict[str, Any]] | None
    predecessor: handover.HandOver | None
    rows_as_given: Any
    stopping = False
    told_to_stop: str | None = None

    def mix_prepared_rows(self) -> None:
        """Rows that methods have made by now are mixed in; there is no mixer here."""

    def replay_totals(self) -> np.ndarray | None:
        """Task tokens, replayed tokens and rows drawn, (sources, slots, 3), over all processes."""
        if self.mixer is None:
            return None
        counters = torch.from_numpy(self.mixer.counters()).to(self.accelerator.device)
        return self.accelerator.reduce(counters, reduction="sum").cpu().numpy()

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
            # Every process has written its last file. All are on the disk before an older checkpoint is removed.
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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """SFTTrainer's; says what to do where it cannot be written. Told to stop, it ends once the model is saved."""
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.args.output_dir)
        way_out = (
            "The trained model is still in this process: make room there, or call save_model with a folder elsewhere."
        )
        with stop.after_saving(self, folder), writing(folder, way_out) if self.methods else nullcontext():
            super().save_model(output_dir, _internal_call)

    def save_finished(self, folder: str) -> None:
        """Save the model with what its methods leave for the next task; adapters that act together become one."""
        target, main = Path(folder), self.args.should_save
        staged = main and hand_over.stage(self, target)
        if adapters.is_stacked(self.accelerator.unwrap_model(self.model)):
            super().save_finished(str(target / adapters.PARTS))
            if main:
                adapters.join(target)
        else:
            super().save_finished(folder)
        if staged:
            handover.commit(target)
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.stopping:  # whoever told it to stop does not wait for an upload
            super()._push_from_checkpoint(checkpoint_folder)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As of `PublishingTrainer`; a run that was stopped is not published."""
        stop.check_finished(self)
        return super().push_to_hub(*args, **kwargs)

    push_to_hub.__doc__ = PublishingTrainer.push_to_hub.__doc__

    def _after_a_full_disk(self, folder: Path) -> str:
        """What is safe, and what to do."""
        whole_one = state.last_complete_checkpoint(folder, everywhere=False) if folder.is_dir() else None
        keep = "Make room there, or keep fewer checkpoints (save_total_limit, save_only_model)"
        if whole_one is None:
            return f"No checkpoint is whole yet. {keep}, and train again."
        return f"{whole_one} is whole. {keep}; after that train(resume_from_checkpoint=True) resumes from it."

    def _complete(self, checkpoint: Path) -> None:
        """Write what makes a checkpoint whole."""
        if self.args.save_only_model:
            states = {m.name: m.state_dict(self.run) for m in self.methods}
            kept = {m.name: states[m.name] for m in self.methods if m.state_with_model}
            self._write_state(str(checkpoint), kept, [n for n, s in states.items() if s and n not in kept])
        if self.args.should_save:
            whole.write_marker(checkpoint)

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

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """SFTTrainer's, except that True resumes from the newest whole checkpoint, and one trainer at a time has the folder.

        Told to stop by SIGTERM, SIGINT or SIGUSR1, or by `max_minutes`, it saves a checkpoint at the end of the step and
        raises `Stopped`, which ends the process with exit code 75.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = state.last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"No complete checkpoint in {self.args.output_dir}: nothing to resume. Train without "
                    f"resume_from_checkpoint, or set save_strategy and save_steps so that checkpoints are written."
                )
        if resume_from_checkpoint:
            checkpoint = Path(resume_from_checkpoint)
            if self.methods or state.read_run(checkpoint):
                state.check_whole(checkpoint)
            places = {kind_of(type(m)): m.places for m in self.methods}
            state.check_same_methods(checkpoint, self.methods.describe(), places)
        self.task_states = None
        with run_lock.held(Path(self.args.output_dir)) if self.methods else nullcontext(), stop.at_steps(self):
            try:
                if self.methods:
                    hand_over.before_training(self)
                result = super().train(resume_from_checkpoint, *args, **kwargs)
                hand_over.leave_with_model(self)
                return result
            finally:  # an error or Ctrl-C must not leave hooks on a model that is used further
                for method in self.methods:
                    method.release()
                if self.tap is not None:
                    self.tap.remove()
