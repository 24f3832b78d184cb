"""What methods make of the loss of a micro-batch: weights of the task's tokens, then terms that are added."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hf_continual.methods.base import Forward

if TYPE_CHECKING:
    from torch import Tensor

    from hf_continual.trainer.live import LiveTrainer


def added_loss(trainer: LiveTrainer, forward: Forward, steps: int) -> Tensor | None:
    """The sum to add to the loss of this micro-batch, or None; each term is logged.

    Args:
        trainer: The trainer.
        forward: The micro-batch, with the trainer's own token loss.
        steps: Micro-batches of the step, over which terms are averaged.

    Returns:
        A scalar.
    """
    extra: list[Tensor] = []
    mixer = trainer.mixer
    for name, source in zip(forward.sources, mixer.sources if mixer else (), strict=True):
        if source.weight != 1:
            weighed = forward.token_loss_BS * forward.label_mask(name)
            extra.append((source.weight - 1) * forward.token_mean(weighed) / steps)
    forward, change = _weighed(trainer, forward)
    if change is not None:
        extra.append(change / steps)
    for method in trainer.methods:
        if method.reads_forward():
            for name, term in method.loss_terms(forward).items():
                trainer.ledger.add(f"{method.name}/{name}", term)
                extra.append(term / steps)
            _log(trainer, method.name, forward)
    return sum(extra[1:], start=extra[0]) if extra else None


def _weighed(trainer: LiveTrainer, forward: Forward) -> tuple[Forward, Tensor | None]:
    """The micro-batch with weighed tokens, and what that changes in its loss; the weights of several methods are multiplied."""
    weight_BS: Tensor | None = None
    for method in trainer.methods:
        if method.weighs_tokens():
            found = method.weigh_tokens(forward).detach()
            weight_BS = found if weight_BS is None else weight_BS * found
            _log(trainer, method.name, forward)
    if weight_BS is None:
        return forward, None
    weight_BS = weight_BS.where(forward.label_mask(), 1.0)  # of the task's own tokens only
    change = forward.token_mean((weight_BS - 1) * forward.token_loss_BS)
    return replace(forward, token_loss_BS=weight_BS * forward.token_loss_BS), change


def _log(trainer: LiveTrainer, name: str, forward: Forward) -> None:
    for key, (total, count) in forward.notes.items():
        trainer.ledger.add(f"{name}/{key}", total, count)
    forward.notes.clear()
