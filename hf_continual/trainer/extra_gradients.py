"""Gradients on rows outside the training batches: for an outer loop, or to measure importance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from hf_continual import private

if TYPE_CHECKING:
    from torch import Tensor

    from hf_continual.methods.base import Batch
    from hf_continual.trainer.live import LiveTrainer


@contextmanager
def aside(trainer: LiveTrainer, micro_batches: int) -> Iterator[None]:
    """Keep losses computed inside the context out of all metrics, and their forward passes away from all methods."""
    kept = trainer.tap, trainer.current_gradient_accumulation_steps, trainer.is_aside
    trainer.tap, trainer.current_gradient_accumulation_steps, trainer.is_aside = None, micro_batches, True
    try:
        with private.metrics_apart(trainer):
            yield
    finally:
        trainer.tap, trainer.current_gradient_accumulation_steps, trainer.is_aside = kept


def gradients(
    trainer: LiveTrainer,
    batches: Sequence[Batch],
    scale: float = 1.0,
    clip: bool = True,
    training: bool = True,
    alone: bool = False,
) -> Tensor:
    """Leave the gradient of some batches in `.grad`, as an optimizer step of the trainer would.

    Args:
        trainer: The trainer, between two steps.
        batches: Micro-batches of this process.
        scale: Factor of the loss.
        clip: Whether the gradient is clipped as in a step.
        training: False leaves dropout out.
        alone: Use this process's batches only; nothing is reduced over processes.

    Returns:
        The loss, a scalar without gradient: the mean over the batches' tokens on all processes.
    """
    model, accelerator = trainer.model_wrapped, trainer.accelerator
    was_training = model.training
    model.train(training)
    items: Any = None
    if trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None:
        with _counted_here(trainer, alone):
            items = private.count_items(trainer, batches)
        if items is not None:
            items = items.clamp(min=1) if torch.is_tensor(items) else max(items, 1)
    total = torch.zeros((), device=trainer.args.device)
    with aside(trainer, len(batches)):
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1 and not alone
            together = nullcontext() if last else accelerator.no_sync(model)
            with together:
                with trainer.compute_loss_context_manager():
                    with _counted_here(trainer, alone):
                        loss: Any = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
                if items is None:
                    loss = loss / len(batches)
                accelerator.backward(loss * scale if scale != 1 else loss)
            total += loss.detach()
    model.train(was_training or training)
    private.clip_or_norm(trainer, model, clip)
    return total


@contextmanager
def _counted_here(trainer: LiveTrainer, alone: bool) -> Iterator[None]:
    """Count tokens on this process only, and do not multiply the loss by the number of processes."""
    before = trainer.args.average_tokens_across_devices
    if alone:
        trainer.args.average_tokens_across_devices = False
    try:
        yield
    finally:
        trainer.args.average_tokens_across_devices = before


def step(trainer: LiveTrainer, update: Any) -> bool:
    """Step the trainer's optimizer, or call `update` in its place, unless gradients overflowed under a scaler.

    Args:
        trainer: The trainer, gradients in place.
        update: Changes the weights, or None for the trainer's optimizer.

    Returns:
        Whether a step was made.
    """
    scaler, optimizer = trainer.accelerator.scaler, trainer.optimizer
    assert optimizer is not None
    if update is None:
        optimizer.step()
        return not trainer.accelerator.optimizer_step_was_skipped
    if scaler is None:
        update()
        return True
    norms = [p.grad.norm() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    finite = bool(torch.isfinite(torch.stack(norms)).all())
    if finite:
        update()
    # As after every step: update the scale, and let the scaler forget that these gradients were unscaled.
    scaler.update()
    return finite
