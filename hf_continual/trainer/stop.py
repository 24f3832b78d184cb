"""Stop training on request: it saves at the end of the step, with its task unfinished, and resumes from there."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_continual import private, stopping
from hf_continual.data.distributed import from_first
from hf_continual.trainer.state import is_complete, last_complete_checkpoint

if TYPE_CHECKING:
    from hf_continual.trainer.live import LiveTrainer

logger = logging.getLogger(__name__)


class Agreement:
    """Agreement on whether any process of the run was asked to stop; all get the same answer at the same step.

    A request at the end of a step takes effect at the end of the next: the exchange, of 4 bytes between CPUs, runs
    during the step, and no accelerator waits for it. With one process it takes effect at once.
    """

    def __init__(self) -> None:
        several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        self.group: Any = distributed.new_group(backend="gloo") if several and distributed.is_gloo_available() else None
        # One tensor for all steps. A new one each time could be freed by gloo's thread, which then needs Python's lock;
        # a process that is just exiting aborts on that.
        self.flag = torch.zeros(1)
        self.said: Any = None

    def stop(self) -> bool:
        """Whether to stop; all processes call this at each step."""
        asked = stopping.asked() is not None
        if self.group is None:
            return asked
        heard = self._heard()
        self.flag.fill_(float(asked))
        self.said = distributed.all_reduce(self.flag, distributed.ReduceOp.MAX, self.group, async_op=True)
        return heard

    def _heard(self) -> bool:
        if self.said is None:
            return False
        self.said.wait()
        self.said = None
        return bool(self.flag.item())  # on the CPU

    def close(self) -> None:
        """End the exchange; all processes get here, or the run has failed."""
        if self.group is not None:
            self._heard()
            distributed.destroy_process_group(self.group)
            self.group = None


class StopAtStep(TrainerCallback):
    """Saves at the end of the step in which the run is asked to stop, and ends it.

    Last of the callbacks: the others have ended the step, and logged and evaluated what was due, when the checkpoint is
    written.

    Args:
        trainer: The trainer to stop.
    """

    def __init__(self, trainer: LiveTrainer) -> None:
        self.trainer = trainer
        self.deferral = ExitStack()
        self.agreement: Agreement | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on, weights change that are not in any file."""
        self.trainer.started_at = state.global_step, private.tokens_seen(self.trainer)
        self.deferral.close()
        self.deferral.enter_context(stopping.deferred())
        if self.agreement is None:
            self.agreement = Agreement()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save here: only now does a checkpoint hold everything."""
        # A run that ends by itself at this step is saved as a finished one.
        if self.agreement is not None and self.agreement.stop() and not control.should_training_stop:
            self.trainer.stopping = True
            args.save_only_model = False  # a run cannot resume from the weights alone
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop: the checkpoint is complete."""
        if self.trainer.stopping:
            saved = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            stopping.stop(
                f"at step {state.global_step} of {state.max_steps}", kept=f"The training so far is saved in {saved}."
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All steps are done; if the last one is saved, the rest can be repeated."""
        if self.agreement is not None:
            self.agreement.close()
        self.agreement = None
        saved = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if from_first(lambda: saved.is_dir() and is_complete(saved)):
            self.deferral.close()
            stopping.check()


@contextmanager
def after_saving(trainer: LiveTrainer, folder: Path) -> Iterator[None]:
    """Save a finished model completely inside the context; if asked to stop, end after that.

    Args:
        trainer: The trainer that saves.
        folder: The model's folder.

    Yields:
        None: While it saves.

    Raises:
        Stopped: If the run was asked to stop, now or as training ended.
    """
    with stopping.listening("The task is finished; nothing of it is lost."):
        with stopping.deferred():
            yield
        why, trainer.told_to_stop = trainer.told_to_stop or stopping.asked(), None
        if why is not None and stopping.is_outermost():  # a plan must record that the task is trained
            stopping.stop(f"with the model saved in {folder}", why)


def check_finished(trainer: LiveTrainer) -> None:
    """Refuse to publish a run that was stopped before its task ended.

    Args:
        trainer: The trainer that publishes.

    Raises:
        ValueError: If it was stopped.
    """
    if trainer.stopping:
        raise ValueError(
            f"This run was stopped at step {trainer.state.global_step} of {trainer.state.max_steps}: its task is not finished, and "
            f"nothing is published. {how_to_resume(trainer)} To publish the model as it is, save it and push the folder: "
            f"hf_continual.push_to_hub(folder, ...)."
        )


@contextmanager
def at_steps(trainer: LiveTrainer) -> Iterator[None]:
    """Train inside the context: if asked to stop, save and end after a step, or at once if nothing would be lost.

    Args:
        trainer: The trainer; its `stopping` tells afterwards whether it was asked to stop.

    Yields:
        None: While it trains.

    Raises:
        Stopped: If it was asked to stop.
    """
    trainer.stopping, trainer.told_to_stop = False, None
    callback, save_only_model = StopAtStep(trainer), trainer.args.save_only_model
    try:
        with stopping.listening(lambda: how_to_resume(trainer), getattr(trainer.args, "max_minutes", None)):
            trainer.add_callback(callback)
            try:
                yield
            finally:
                callback.deferral.close()
                trainer.remove_callback(callback)
                trainer.args.save_only_model = save_only_model
            if why := stopping.asked():
                # All steps are done and not saved: none may be lost, so the model is saved first.
                logger.warning("Asked to stop by %s as training ended; save_model saves the model and then stops.", why)
                trainer.told_to_stop = why
    except stopping.Stopped:
        trainer.stopping = True
        raise


def how_to_resume(trainer: LiveTrainer) -> str:
    """How a script resumes."""
    checkpoint = last_complete_checkpoint(trainer.args.output_dir, everywhere=False)
    if checkpoint is None:
        return "Nothing was trained yet; the same script starts again."
    return f"The task is unfinished and safe in {checkpoint}; train(resume_from_checkpoint=True) resumes it."
