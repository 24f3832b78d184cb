"""SFTTrainer with methods, which stops on request, and a model card in its pushes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers.trainer_utils import HubStrategy, SaveStrategy

from hf_continual.disk import writing
from hf_continual.hub.text import kept_text
from hf_continual.inference.kinds import kind_of
from hf_continual.trainer import adapters, method_rows, stop
from hf_continual.trainer.mixin import MethodsMixin
from hf_continual.trainer.trl_trainer import SFTTrainer

if TYPE_CHECKING:
    from hf_continual.trainer.mixer import ReplayMixer
    from hf_continual.trainer.publish import Publisher


class SavingTrainer(MethodsMixin, SFTTrainer):
    """The part of `ContinualTrainer` that saves with a card, stops and pushes."""

    publisher: Publisher

    def replay_totals(self) -> np.ndarray | None:
        """See `hf_continual.trainer.method_rows.replay_totals`."""
        return method_rows.replay_totals(self)

    def mix_prepared_rows(self) -> None:
        """See `hf_continual.trainer.method_rows.mix_prepared_rows`."""
        method_rows.mix_prepared_rows(self)

    def rows_of_methods(self) -> ReplayMixer | None:
        """See `hf_continual.trainer.method_rows.mixer_of`."""
        return method_rows.mixer_of(self)

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
        self.save_with_methods(folder)

    def write_model(self, folder: str) -> None:
        """Write the model; stacked adapters as one, and modules that a method brought where they are loaded from."""
        live, target = self.accelerator.unwrap_model(self.model), Path(folder)
        if not ((stacked := adapters.is_stacked(live)) or kind_of(live) is not None):
            super().write_model(folder)
            return
        super().write_model(str(target / adapters.PARTS))
        if self.args.should_save:
            (adapters.join if stacked else adapters.put_in_place)(target)

    def stoppable(self) -> AbstractContextManager[None]:
        """SIGTERM, SIGINT, SIGUSR1 and `max_minutes` save a checkpoint at the end of the step and end it; see `stop`."""
        return stop.at_steps(self)

    def after_training(self) -> None:
        """Push the last save, which is the model."""
        self._push_last_save()

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
