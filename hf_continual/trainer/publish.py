"""A trainer's pushes: checked before the first step, one commit each, every failure reported."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import HubStrategy

from hf_continual.hub.adapters import ONE_WAY_OUT, WAYS_OUT
from hf_continual.hub.card import render_card
from hf_continual.hub.contents import WANTED
from hf_continual.hub.errors import HubPushError
from hf_continual.hub.facts import CardFacts, Evaluation
from hf_continual.hub.files import write_card
from hf_continual.hub.licences import with_license
from hf_continual.hub.lint import lint_card
from hf_continual.hub.preflight import check_bases, preflight
from hf_continual.hub.push import Pushed, push_to_hub
from hf_continual.hub.reload import check_same
from hf_continual.trainer.facts import run_facts

if TYPE_CHECKING:
    from hf_continual.trainer.live import LiveTrainer

logger = logging.getLogger(__name__)

# Arguments of transformers' generated card, which this library's card ignores.
CARD_WORDS = (
    "model_name",
    "tags",
    "finetuned_from",
    "tasks",
    "dataset",
    "dataset_name",
    "dataset_tags",
    "dataset_args",
)


class CheckpointPushes:
    """Pushes of checkpoints in the background, one at a time.

    transformers never checks the outcome of such pushes; here every failure is kept and logged.
    """

    def __init__(self) -> None:
        self.running: list[tuple[int, Future[Any]]] = []
        self.failures: list[tuple[int, Exception]] = []
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="push")

    def is_done(self) -> bool:
        """Whether no push is pending."""
        return all(future.done() for _, future in self.running)

    def start(self, step: int, call: Callable[[], Any]) -> None:
        """Push a checkpoint after the pending ones."""
        self.running.append((step, self.pool.submit(call)))

    def collect(self) -> None:
        """Wait for pending pushes, and log failures."""
        for step, future in self.running:
            error = future.exception()
            if isinstance(error, Exception):
                self.failures.append((step, error))
                logger.error("the push of step %d failed: %s", step, error)
        self.running.clear()


class Publisher:
    """The pushes of one trainer.

    Args:
        trainer: The trainer, which may still be under construction.
        train_rows: Number of the task's rows; None for a stream.
    """

    def __init__(self, trainer: LiveTrainer, train_rows: int | None) -> None:
        self.trainer = trainer
        self.train_rows = train_rows
        self.evaluation = Evaluation()
        self.pushes = CheckpointPushes()

    def facts(self, evaluation: Evaluation | None = None) -> CardFacts:
        """The facts of the run so far, see `run_facts`."""
        return run_facts(self.trainer, evaluation, self.train_rows)

    def open_repository(self, token: str | None, private: bool | None) -> str:
        """Check token, permissions and visibility; create the repository.

        Args:
            token: Overrides ``hub_token``.
            private: Overrides ``hub_private_repo``.

        Returns:
            The repository's full id.

        Raises:
            ValueError: If the strategy pushes pickles.
            HubPushError: If a push cannot succeed.
        """
        args = self.trainer.args
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"hub_strategy={args.hub_strategy.value!r} publishes optimizer and random states, which are pickles that run "
                f"code when they are loaded. Use 'every_save' or 'end', and resume from the checkpoints on disk."
            )
        return preflight(
            args.hub_model_id or Path(args.output_dir).absolute().name,
            private=args.hub_private_repo if private is None else private, revision=args.hub_revision,
            token=token or args.hub_token,
        ).repo_id  # fmt: skip

    def check_before_training(self) -> None:
        """Lint the future card, and look up its base, before the first step.

        Raises:
            HubPushError: If the push after training would be refused.
        """
        args, facts = self.trainer.args, self.facts()
        target = preflight(
            self.trainer.hub_model_id, private=args.hub_private_repo, revision=args.hub_revision, token=args.hub_token
        )  # fmt: skip
        if facts.kind == "adapter" and facts.base.hub_id is None:
            raise target.error(
                f"it would be an adapter on {facts.base.name or 'a local model'}, which is not published: nobody could load "
                f"it. {ONE_WAY_OUT if 'kind' in facts.adapter else WAYS_OUT} If that is a copy of a published model, name it: ContinualConfig(hub_base_model='...')."
            )
        known = check_bases(target, facts)
        try:
            facts = with_license(facts, getattr(args, "hub_license", None), known)
        except ValueError as error:
            raise target.error(f"{error} Here: ContinualConfig(hub_license='...').") from error
        if findings := lint_card(render_card(facts)):
            raise target.error("card check would report:\n  " + "\n  ".join(map(str, findings)))

    def write_run_card(self, folder: Path, evaluation: Evaluation | None = None, **changes: Any) -> None:
        """Write card, configuration and results next to a saved model; on the main process."""
        facts = self.facts(evaluation or self.evaluation)
        write_card(folder, replace(facts, **changes) if changes else facts)

    def push_run(
        self, folder: Path, message: str, *, token: str | None, revision: str | None, private: bool | None, blocking: bool,
        **options: Any,
    ) -> Pushed | Future[Any] | None:  # fmt: skip
        """Push a saved run; see `ContinualTrainer.push_to_hub`."""
        trainer, args = self.trainer, self.trainer.args
        ignored = {key: options.pop(key) for key in CARD_WORDS if key in options}
        if any(value for key, value in ignored.items() if key != "model_name"):
            logger.info("not read, because the card is made from facts: %s", ", ".join(ignored))
        language, evaluation = options.pop("language", None), options.pop("evaluation", None)
        self.evaluation = evaluation or self.evaluation
        changes: dict[str, Any] = (
            {"languages": (language,) if isinstance(language, str) else tuple(language)} if language else {}
        )
        self.write_run_card(folder, **changes)
        known = ("tag", "license", "base_model", "create_pr", "dry_run", "method_state", "include")
        if unknown := [key for key in options if key not in known]:
            raise TypeError(
                f"push_to_hub has no argument {unknown[0]!r}; it takes {', '.join(('evaluation', 'language', *known))}."
            )
        options.setdefault("license", getattr(args, "hub_license", None))
        options.setdefault("base_model", getattr(args, "hub_base_model", None))
        token, revision = token or args.hub_token, revision or args.hub_revision
        private = args.hub_private_repo if private is None else private
        try:
            self._compare(folder)
        except ValueError as error:
            raise HubPushError(str(error), trainer.hub_model_id, folder) from error

        def push() -> Pushed | None:
            return push_to_hub(
                folder, trainer.hub_model_id, private=private, revision=revision, token=token, message=message, **options
            )  # fmt: skip

        if blocking:
            return push()
        self.pushes.start(trainer.state.global_step, push)
        return self.pushes.running[-1][1]

    def _compare(self, folder: Path) -> None:
        """Compare the model on disk with the live one, if one process holds all of it."""
        model: Any = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled or getattr(model, "is_quantized", False):
            logger.info("weights are sharded or quantised: the saved model was not compared with the live one")
            return
        check_same(folder, model)

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Push a checkpoint in the background, from links that outlive its rotation.

        Args:
            checkpoint: Folder of the checkpoint.
        """
        trainer, args, step = self.trainer, self.trainer.args, self.trainer.state.global_step
        staged = Path(args.output_dir) / f".push-{step}"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        for pattern in WANTED:
            for file in checkpoint.glob(pattern):
                if file.is_file() and not (staged / file.name).exists() and file.name != "README.md":
                    _link(file, staged / file.name)
        (staged / "trainer_state.json").unlink(missing_ok=True)
        self.write_run_card(staged)

        def push() -> Pushed | None:
            try:
                return push_to_hub(
                    staged, trainer.hub_model_id, private=args.hub_private_repo, revision=args.hub_revision,
                    token=args.hub_token, license=getattr(args, "hub_license", None),
                    base_model=getattr(args, "hub_base_model", None), message=f"Training in progress, step {step}",
                )  # fmt: skip
            except HubPushError as error:
                raise HubPushError(error.problem, error.repo_id, checkpoint) from error
            finally:
                shutil.rmtree(staged, ignore_errors=True)

        self.pushes.start(step, push)


def _link(file: Path, target: Path) -> None:
    # Copy files that may be rewritten in place; weights are replaced, never overwritten.
    if file.suffix == ".safetensors":
        try:
            os.link(file, target)
            return
        except OSError:
            pass
    shutil.copy2(file, target)
