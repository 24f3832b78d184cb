"""SFTTrainer with methods' state in its checkpoints and a model card in its pushes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy

from hf_continual.data import handover
from hf_continual.disk import writing
from hf_continual.hub.text import kept_text
from hf_continual.inference.kinds import kind_of
from hf_continual.methods.compose import kind_of as kind_of_method
from hf_continual.trainer import adapters, hand_over, run_lock, state, stop, whole
from hf_continual.trainer.live import LiveTrainer
from hf_continual.trainer.method_rows import replay_totals

if TYPE_CHECKING:
    from hf_continual.trainer.publish import Publisher


class SavingTrainer(LiveTrainer):
    """The part of `ContinualTrainer` that saves, resumes and pushes."""

    publisher: Publisher

    def replay_totals(self) -> np.ndarray | None:
        """See `hf_continual.trainer.method_rows.replay_totals`."""
        return replay_totals(self)

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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as SFTTrainer does, with a card from the known facts; push it with ``push_to_hub=True``.

        If it cannot be written, the error says what to do. If asked to stop, it ends once the model is saved.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        folder = Path(output_dir or self.args.output_dir)
        way_out = (
            "The trained model is still in this process: free space there, or call save_model with another folder."
        )
        with stop.after_saving(self, folder), writing(folder, way_out) if self.methods else nullcontext():
            self.save_finished(str(folder))
            if self.args.should_save:
                self.publisher.write_run_card(folder)
            if self.args.push_to_hub:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_finished(self, folder: str) -> None:
        """Save the model with what its methods leave for the next task; stacked adapters are joined into one."""
        target, main = Path(folder), self.args.should_save
        staged = main and hand_over.stage(self, target)
        live = self.accelerator.unwrap_model(self.model)
        if (stacked := adapters.is_stacked(live)) or kind_of(live) is not None:
            super().save_model(str(target / adapters.PARTS), _internal_call=True)
            if main:
                (adapters.join if stacked else adapters.put_in_place)(target)
        else:
            super().save_model(folder, _internal_call=True)
        if staged:
            handover.commit(target)
        self.accelerator.wait_for_everyone()

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
        """Train as SFTTrainer does, but True resumes from the newest complete checkpoint, and the folder is locked.

        When stopped by SIGTERM, SIGINT, SIGUSR1 or `max_minutes`, it saves a checkpoint at the end of the step and
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
            places = {kind_of_method(type(m)): m.places for m in self.methods}
            state.check_same_methods(checkpoint, self.methods.describe(), places)
        self.task_states = None
        with run_lock.held(Path(self.args.output_dir)) if self.methods else nullcontext(), stop.at_steps(self):
            try:
                if self.methods:
                    hand_over.before_training(self)
                result = super().train(resume_from_checkpoint, *args, **kwargs)
                self._push_last_save()
                hand_over.leave_with_model(self)
                return result
            finally:  # an error or Ctrl-C must not leave hooks on a model that is still used
                for method in self.methods:
                    method.release()
                if self.tap is not None:
                    self.tap.remove()

    def _push_last_save(self) -> None:
        saves = self.args.save_strategy != SaveStrategy.NO
        if self.args.push_to_hub and saves and self.args.hub_strategy == HubStrategy.EVERY_SAVE:
            self.push_to_hub()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's draft, unless the folder holds a card with an author's text."""
        card = Path(self.args.output_dir) / "README.md"
        if not card.is_file() or not kept_text(card.read_text(encoding="utf-8", errors="replace")):
            super().create_model_card(*args, **kwargs)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Check token, permissions and visibility and create the repository, before anything is trained."""
        if self.is_world_process_zero():
            self.hub_model_id = self.publisher.open_repository(token, private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model and publish it with card, configuration, results and plots, in one commit.

        It can be called again after a failure: nothing is uploaded twice.

        Example:
            >>> trainer.push_to_hub(evaluation=Evaluation(("law",), ((0.8,),), metric="exact match"), tag="task-1")

        Args:
            commit_message: First line of the commit.
            blocking: False pushes in a thread; the future is returned, and read at the next push.
            token: Overrides ``hub_token``.
            revision: Overrides ``hub_revision``.
            private: Overrides ``hub_private_repo``.
            **kwargs: `evaluation` (the measured scores), `language`, and `tag`, `license`, `base_model`, `create_pr`,
                `dry_run`, `method_state` and `include` of `hf_continual.push_to_hub`.

        Returns:
            What was pushed; None on all processes except the first.

        Raises:
            HubPushError: If it was not pushed. The model is in ``output_dir``.
            ValueError: If the run was stopped and its task is not finished.
        """
        stop.check_finished(self)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_finished(self.args.output_dir)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return self.publisher.push_run(
            Path(self.args.output_dir),
            commit_message or "End of training",
            token=token,
            revision=revision,
            private=private,
            blocking=blocking,
            **kwargs,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.stopping:  # a stop request does not wait for an upload
            return
        # The last checkpoint is the model, which `train` pushes with all facts known by then.
        last = self.state.global_step >= self.state.max_steps
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END or last:
            return
        if self.args.hub_always_push or self.publisher.pushes.is_done():
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            self.publisher.push_checkpoint(Path(checkpoint_folder))

    def _finish_current_push(self) -> None:
        self.publisher.pushes.collect()
