"""A Run over a bare model: methods are tested without a trainer."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from hf_continual.tasks import Task


class FakeRun:
    """Implements `hf_continual.methods.base.Run` as far as unit tests need it."""

    def __init__(self, model: torch.nn.Module, *, lr: float = 1e-3, max_steps: int = 10, task: int = 0) -> None:
        self.model, self.learning_rate, self.max_steps = model, lr, max_steps
        self.task, self.step, self.seed = Task(index=task), 0, 0
        self.device, self.is_sharded = torch.device("cpu"), False
        self.optimizer: Any = None
        self.extra_updates, self.output_dir = 0, None

    autocast_dtype = None
    place = (1, 0)
    is_main_process = True

    def autocast(self) -> Any:
        return contextlib.nullcontext()

    def optimizer_defaults(self) -> dict[str, Any]:
        return {"lr": self.learning_rate, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def build(self, method: Any) -> Any:
        """Make the method's optimizer over all trainable parameters, one group."""
        choice = method.optimizer(self)
        self.optimizer = choice.cls(list(self.named_parameters().values()), **choice.kwargs)
        return self.optimizer
