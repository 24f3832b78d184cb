"""What a trainer publishes: SFTTrainer whose pushes are checked beforehand, are one commit each, and carry their card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers.trainer_utils import HubStrategy, SaveStrategy
from trl import SFTTrainer

from hf_continual.hub.facts import Evaluation
from hf_continual.hub.text import kept_text
from hf_continual.trainer import publish

if TYPE_CHECKING:
    from hf_continual.methods.compose import Methods


class PublishingTrainer(SFTTrainer):
    """The part of `ContinualTrainer` that saves and pushes.

    Args:
        *args: As for SFTTrainer.
        train_dataset: As for SFTTrainer.
        **kwargs: As for SFTTrainer.
    """

    args: Any
    model: Any
    hub_model_id: Any
    methods: Methods

    def __init__(self, *args: Any, train_dataset: Any = None, **kwargs: Any) -> None:
        self.evaluation = Evaluation()
        self.train_rows = len(train_dataset) if isinstance(train_dataset, Dataset) else None
        self.push_in_progress: Any = publish.CheckpointPushes()
        super().__init__(*args, train_dataset=train_dataset, **kwargs)

    def check_push(self) -> None:
        """Check that what was asked to be published can be, before anything is trained."""
        if self.args.push_to_hub and self.is_world_process_zero():
            publish.check_before_training(self)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """SFTTrainer's; with ``push_to_hub=True`` the last save is pushed with all that is known then."""
        result = super().train(*args, **kwargs)
        saves = self.args.save_strategy != SaveStrategy.NO
        if self.args.push_to_hub and saves and self.args.hub_strategy == HubStrategy.EVERY_SAVE:
            self.push_to_hub()
        return result

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """SFTTrainer's, with a card of what is known; pushes it with ``push_to_hub=True``."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        self.save_finished(output_dir or self.args.output_dir)
        if self.args.should_save:
            publish.write_run_card(self, Path(output_dir or self.args.output_dir))
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_finished(self, folder: str) -> None:
        """Save the model as it is handed on, not as a checkpoint."""
        super().save_model(folder, _internal_call=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's draft, unless the folder holds a card with an author's text."""
        card = Path(self.args.output_dir) / "README.md"
        if not card.is_file() or not kept_text(card.read_text(encoding="utf-8", errors="replace")):
            super().create_model_card(*args, **kwargs)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Token, rights and visibility are checked and the repository is made, before anything is trained."""
        if self.is_world_process_zero():
            self.hub_model_id = publish.open_repository(self, token, private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model and publish it with card, configuration, results and pictures, in one commit.

        What failed can be called again: nothing is uploaded twice.

        Example:
            >>> trainer.push_to_hub(evaluation=Evaluation(("law",), ((0.8,),), metric="exact match"), tag="task-1")

        Args:
            commit_message: First line of the commit.
            blocking: False pushes in a thread; the future is returned, and read at the next push.
            token: In place of ``hub_token``.
            revision: In place of ``hub_revision``.
            private: In place of ``hub_private_repo``.
            **kwargs: `evaluation` (what was measured), `language`, and `tag`, `license`, `base_model`, `create_pr`,
                `dry_run`, `method_state` and `include` of `hf_continual.push_to_hub`.

        Returns:
            What was pushed; None on all processes but the first.

        Raises:
            HubPushError: If it was not pushed. The model is in ``output_dir``.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_finished(self.args.output_dir)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return publish.push_run(
            self,
            Path(self.args.output_dir),
            commit_message or "End of training",
            token=token,
            revision=revision,
            private=private,
            blocking=blocking,
            **kwargs,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The last checkpoint is the model, which `train` pushes with all that is known then.
        last = self.state.global_step >= self.state.max_steps
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END or last:
            return
        if self.args.hub_always_push or self.push_in_progress.is_done():
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            publish.push_checkpoint(self, Path(checkpoint_folder))

    def _finish_current_push(self) -> None:
        self.push_in_progress.collect()
