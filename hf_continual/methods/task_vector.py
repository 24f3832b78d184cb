r"""Task vector: undo at the end what the first part of a run did to all tasks alike.

Zheng et al., "Spurious Forgetting in Continual Learning of Language Models", ICLR 2025, https://arxiv.org/abs/2501.13453
(one of the methods compared there), after Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023.

The steps up to e undo how the model answers old tasks; their movement v, times alpha, is subtracted from the trained weights:

    v = theta(e) - theta(start),        theta' = theta(end) - alpha v

The same on checkpoints, without training again, is task arithmetic with weights 1 and -alpha:
``task_arithmetic([end, checkpoint_e], out, base=start, scale=[1.0, -alpha])``. On LoRA adapters the two differ: here the factors
are edited, as in a state dict; there, the products B A.

Memory: 4 bytes per trainable parameter in main memory, from step e on also in every checkpoint; before that, the
weights training starts from, in their own dtype.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hf_continual.bounds import at_least, number, whole_number
from hf_continual.methods.base import Method, Run, State
from hf_continual.paper import Paper
from hf_continual.tensors.flat import local
from hf_continual.tensors.whole import sharded_as, whole

__all__ = ["TaskVector"]

logger = logging.getLogger(__name__)


@dataclass
class TaskVector(Method):
    """Subtract part of the run's early movement from the trained weights.

    Idea: the early movement is common to every run on the task and hurts old tasks; the late movement learns the
    task. Hooks: after step, task end. Cost: one copy of the trainable weights to main memory, at the start and at step e.
    Relations: GradientProjection keeps weights from moving that way in the first place. It acts in every task it is
    given to. Methods that come later in the list see the edited weights when the task ends. Composes with everything.

    Args:
        at: e, an optimizer step, or a number between 0 and 1, a fraction of the run. The paper's plots use epochs 12 to
            18 of checkpoints up to 25, so half of the run is the default.
        alpha: Fraction of v to subtract; the paper's table has 0.16 and 0.22.
        name: Prefix of the logged values, and of its files.

    Raises:
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If one is out of range, or e is after the end of the run.
    """

    at: float = 0.5
    alpha: float = 0.16
    name: str = "task_vector"  # pyrefly: ignore[bad-override]

    paper: ClassVar[Paper] = Paper(
        "Spurious Forgetting in Continual Learning of Language Models",
        "Zheng et al.",
        2025,
        arxiv="2501.13453",
        venue="ICLR 2025",
    )
    _start: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _vector: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        number("TaskVector", "at", self.at)
        if not 0 < self.at < 1:
            whole_number("TaskVector", "at", int(self.at) if self.at == int(self.at) else self.at, unit="steps")
        at_least("TaskVector", "alpha", self.alpha, 0)

    def reads_reference(self) -> bool:
        """Always: it needs the weights that training starts from."""
        return True

    def prepare(self, run: Run) -> None:
        """Remember the weights that training starts from, also in a resumed run."""
        self._vector = {}
        if self.alpha:
            self._start = {n: p.detach().to("cpu", copy=True) for n, p in run.named_parameters().items()}

    def begin_task(self, run: Run) -> None:
        """Refuse a step after the end of the run."""
        if self.alpha and self._step(run) >= run.max_steps:
            raise ValueError(
                f"TaskVector(at={self.at:g}): the run has {run.max_steps} steps, and the vector must end before the last one. Give a "
                f"step below {run.max_steps}, or a fraction of the run such as at=0.5."
            )

    def _step(self, run: Run) -> int:
        return max(round(self.at * run.max_steps), 1) if self.at < 1 else int(self.at)

    @torch.no_grad()
    def end_step(self, run: Run) -> None:
        """Compute the vector at step e."""
        if not self._start or run.step < self._step(run):  # a step that a scaler skipped does not count
            return
        for name, p in run.named_parameters().items():
            now = whole(p.detach())
            self._vector[name] = now.to("cpu", torch.float32, copy=True) - self._start.pop(name).float()
        self._start = {}

    @torch.no_grad()
    def end_task(self, run: Run) -> None:
        """Subtract the vector."""
        if self.alpha and not self._vector:
            logger.warning("TaskVector: training ended before step %d; nothing is subtracted.", self._step(run))
        for name, p in run.named_parameters().items():
            if name in self._vector:
                weight = local(p.detach())
                v = local(sharded_as(self._vector[name].to(weight.device), p))
                weight.copy_(weight.float().sub_(v, alpha=self.alpha))
        self._start, self._vector = {}, {}

    def state_dict(self, run: Run) -> State:
        """The vector, once it exists; before that, a resumed run reads the start from its initial weights."""
        return dict(self._vector)

    def load_state_dict(self, state: State, run: Run) -> None:
        """Load the vector."""
        self._vector = dict(state)
        if self._vector:
            self._start = {}
