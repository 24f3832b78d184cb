r"""VR-MCL: meta-learned steps with a gradient variance-reduced against the previous step, on the same batch.

Wu et al., "Meta Continual Learning Revisited: Implicitly Enhancing Online Hessian Approximation via Variance Reduction",
ICLR 2024, https://openreview.net/forum?id=TpD2aG1h0D.

With L_new the loss on the new task's rows of a step's batch and L that on the whole batch, replayed rows included, a step is

    theta'_t = theta_t,  n times:  theta'_t <- theta'_t - alpha clamp(grad L_new(theta'_t), -c, c)           (inner steps)
    g_t(theta_t) = grad L(theta'_t)                                                                     (first order)
    m_t = g_t(theta_t) + s (m_{t-1} - g_t(theta_{t-1})),        m_0 = g_0                         (STORM, s = 1 - a)
    theta_{t+1} = theta_t - eta m_t                                      by the run's optimizer: `optim: sgd` is the paper

g_t(theta_{t-1}) is the same on the same batch, from the weights before the last step, with the same dropout.

Cost of a step: n + 1 passes at theta_t, of which the last is the trainer's own, and n + 1 at theta_{t-1}: 2 (n + 1) in place of
1, four times plain training at n = 1; with s = 0 it is n + 1. Memory: 8 bytes per trainable parameter (m and the weights
before), 4 with s = 0 or n = 0; no second-order graph is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import Parameter

from hf_continual.bounds import between, plain_name, whole_number
from hf_continual.data.collator import ORIGIN
from hf_continual.data.replay import ReplayRows, RowType
from hf_continual.data.row_values import TEXTUAL
from hf_continual.data.rows import load_rows
from hf_continual.methods.base import PADDING, TASK, AddedRows, Batch, Method, Run, State
from hf_continual.paper import Paper
from hf_continual.tensors.flat import Flat, local

__all__ = ["VRMCL", "inner_step", "variance_reduced"]


def inner_step(weight: Tensor, grad: Tensor, rate: float, bound: float | None = None) -> Tensor:
    """A step of plain gradient descent with every element of the gradient bounded.

    Args:
        weight: theta', any shape.
        grad: Its gradient, of the same shape.
        rate: alpha.
        bound: c; None: no bound.

    Returns:
        theta' - alpha clamp(grad, -c, c), a new tensor.
    """
    return weight - rate * (grad if bound is None else grad.clamp(-bound, bound))


def variance_reduced(grad: Tensor, last: Tensor, grad_before: Tensor, momentum: float) -> Tensor:
    """STORM's estimate of the gradient (Cutkosky & Orabona 2019, https://arxiv.org/abs/1905.10018).

    Args:
        grad: g_t(theta_t), any shape.
        last: m_{t-1}, of the same shape.
        grad_before: g_t(theta_{t-1}): of the same batch, at the weights before the last step.
        momentum: s in [0, 1).

    Returns:
        g_t(theta_t) + s (m_{t-1} - g_t(theta_{t-1})), a new tensor.
    """
    return grad + momentum * (last - grad_before)


@dataclass
class VRMCL(Method):
    """Step along the gradient after a few steps on the new task, variance-reduced over time.

    Idea: a gradient taken after inner steps on the new task, of the loss on new and old rows, favours directions in which both
    agree; it is noisy, since few rows are replayed, and STORM's correction removes that noise.
    Hooks: rows, before a step, gradients, after step. Cost: see the module; 2 (n + 1) times a plain step.
    Relations: KIF alternates between both kinds of rows and fuses the movements. Composes with everything: loss terms of
    other methods are taken after the inner steps and are not in the correction; methods that edit gradients edit m_t.
    Differs from the authors' code, which is for images: one rate for all inner steps instead of learned ones, each inner step
    on the whole batch instead of a part (so that nothing depends on accumulation and processes), the meta-loss after the last
    inner step instead of their mean, first order, the trainer's clipping of g, and the run's optimizer and schedule.

    Args:
        memory: Rows of earlier tasks to mix into the batches, as `Replay.rows`; in a plan ``kept`` or
            ``earlier_tasks``. None: another method adds them, or there are none yet.
        ratio: Their fraction of the tokens, strictly between 0 and 1; the paper replays as many rows as it sees new ones.
        inner_steps: n, steps on the new task's rows before the gradient is taken; 0 takes it at the current weights.
        inner_learning_rate: alpha.
        inner_clip: c, bound of each element of an inner gradient; None: none.
        momentum: s in [0, 1); 0 disables the correction.
        row_type: As in `Replay`.
        name: Prefix of the logged values, and name of the replay source.

    Raises:
        FileNotFoundError: If `memory` is a path that does not exist.
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If one is out of range.
    """

    memory: Dataset | str | list[dict[str, Any]] | None = None
    ratio: float = 0.5
    inner_steps: int = 1
    inner_learning_rate: float = 0.1
    inner_clip: float | None = None
    momentum: float = 0.15
    row_type: RowType = "same"
    name: str = "vrmcl"  # pyrefly: ignore[bad-override]

    bytes_per_parameter: ClassVar[float] = 8.0
    places: ClassVar[tuple[str, ...]] = ("memory",)
    paper: ClassVar[Paper] = Paper(
        "Meta Continual Learning Revisited: Implicitly Enhancing Online Hessian Approximation via Variance Reduction",
        "Wu et al.",
        2024,
        venue="ICLR 2024",
        link="https://openreview.net/forum?id=TpD2aG1h0D",
    )
    _flat: Flat | None = field(default=None, init=False, repr=False, compare=False)
    _weights: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    _direction: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    _loaded: State = field(default_factory=dict, init=False, repr=False, compare=False)
    _inside: bool = field(default=False, init=False, repr=False, compare=False)
    _follows: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        between("VRMCL", "ratio", self.ratio, 0, 1)
        whole_number("VRMCL", "inner_steps", self.inner_steps, least=0)
        between("VRMCL", "inner_learning_rate", self.inner_learning_rate, 0, float("inf"))
        if self.inner_clip is not None:
            between("VRMCL", "inner_clip", self.inner_clip, 0, float("inf"))
        between(
            "VRMCL",
            "momentum",
            self.momentum,
            0,
            1,
            "[",
            "It is 1 - a of STORM; 1 would never forget the first gradient.",
        )
        plain_name("VRMCL", self.name)
        # Read now: a wrong path must fail before a model is loaded, not after.
        self._rows = None if self.memory is None else load_rows(self.memory, checked=TEXTUAL)

    def added_rows(self) -> AddedRows | None:
        """The ratio of the buffer's rows."""
        return None if self._rows is None else AddedRows(self.ratio)

    def extra_steps(self, steps: int) -> int:
        """The inner steps, and all passes at the previous weights, which the first step does not have."""
        before = (self.inner_steps + 1) * max(steps - 1, 0) if self.momentum else 0
        return self.inner_steps * steps + before

    def replay(self, run: Run) -> ReplayRows | None:
        """The buffer's rows, for the batches."""
        return None if self._rows is None else ReplayRows(self._rows, self.ratio, row_type=self.row_type)

    def begin_task(self, run: Run) -> None:
        """Allocate the tensors, and fill them from a checkpoint."""
        self.release()
        if not (self.inner_steps or self.momentum):
            return
        self._flat = flat = Flat(run.named_parameters(), run.optimizer)
        self._weights = flat.zeros()
        self._direction = flat.zeros() if self.momentum else None
        self._follows = bool(self._loaded.get("follows"))
        if self._follows:
            for key, buffer in self._buffers().items():
                flat.fill(buffer, self._loaded, f"{key}/")
        self._loaded = {}

    def begin_step(self, run: Run, batches: Sequence[Batch]) -> None:
        """Correct m for the previous step, and make the inner steps; the trainer's own passes come after them."""
        if self._flat is None or self._weights is None:
            return
        if self._direction is not None:
            if self._follows:
                self._direction.mul_(self.momentum)
                with same_noise(run.device):
                    self._correct(run, batches)
            else:
                self._direction.zero_()
        self._flat.copy_weights(self._weights)
        first = self._go_inside(run, batches)
        if first is not None:
            run.note(f"{self.name}/inner_loss", first)

    def _correct(self, run: Run, batches: Sequence[Batch]) -> None:
        """m <- m - s g_t(theta_{t-1}), where m is s m_{t-1}; weights and theta_{t-1} are exchanged and put back."""
        flat, kept, direction = self._flat, self._weights, self._direction
        assert flat is not None and kept is not None and direction is not None
        for bucket in flat.buckets:
            now = flat.weights(bucket).clone()
            flat.write(bucket, bucket.of(kept))
            bucket.of(kept).copy_(now)
        self._inside = True
        self._go_inside(run, batches)
        run.gradients(batches)

        def subtract() -> None:
            for bucket in flat.buckets:
                bucket.of(direction).sub_(flat.gradients(bucket), alpha=self.momentum)

        if not run.update(subtract):
            direction.zero_()  # an overflow: this step starts like the first
        run.zero_grad()
        self._put_back()

    def _go_inside(self, run: Run, batches: Sequence[Batch]) -> Tensor | None:
        """Make the inner steps from the current weights; return the loss before the first, or None without one."""
        flat, first = self._flat, None
        assert flat is not None

        def move() -> None:
            for bucket in flat.buckets:
                weights = flat.weights(bucket)
                flat.write(
                    bucket, inner_step(weights, flat.gradients(bucket), self.inner_learning_rate, self.inner_clip)
                )

        own = [task_only(batch) for batch in batches] if self.inner_steps else []
        self._inside = self._inside or bool(own)
        for _ in range(self.inner_steps):
            loss = run.gradients(own, clip=False)
            first = loss if first is None else first
            run.update(move)
            run.zero_grad()
        return first

    @torch.no_grad()
    def _put_back(self) -> None:
        """Restore the weights that the step started from, if they were moved."""
        if self._flat is None or self._weights is None or not self._inside:
            return
        for bucket in self._flat.buckets:
            self._flat.write(bucket, bucket.of(self._weights))
        self._inside = False

    @torch.no_grad()
    def edit_gradients(self, params: Mapping[str, Parameter]) -> None:
        """Restore the weights, and replace the gradient with m_t."""
        if self._flat is None:
            return
        self._put_back()
        if self._direction is None:
            return
        for bucket in self._flat.buckets:
            bucket.of(self._direction).add_(self._flat.gradients(bucket))
        for name, view in self._flat.items(self._direction):
            if (grad := params[name].grad) is not None:
                local(grad).copy_(view)
        self._follows = False

    def after_step(self, run: Run) -> None:
        """Note that a step was made: the next one corrects for it."""
        self._follows = self._direction is not None

    def _buffers(self) -> dict[str, Tensor]:
        """The tensors that the next step needs."""
        found = {"before": self._weights, "direction": self._direction}
        return {} if self._direction is None else {k: v for k, v in found.items() if v is not None}

    def state_dict(self, run: Run) -> State:
        """m, and the weights before the last step."""
        if self._flat is None or not self._follows:
            return {}
        state: State = {"follows": True}
        for key, buffer in self._buffers().items():
            state |= self._flat.named(buffer, f"{key}/", run.is_main_process)
        return state

    def load_state_dict(self, state: State, run: Run) -> None:
        """Load them; the tensors are allocated when training starts."""
        self._loaded = dict(state)

    def release(self) -> None:
        """Restore the weights if training ended within a step, and free the tensors."""
        self._put_back()
        self._flat = self._weights = self._direction = None


def task_only(batch: Batch) -> Batch:
    """A batch in which only the new task's rows have a loss."""
    if ORIGIN not in batch:
        return batch
    others = batch[ORIGIN]["source"] != TASK
    return {**batch, "labels": batch["labels"].masked_fill(others, PADDING)}


@contextmanager
def same_noise(device: torch.device) -> Iterator[None]:
    """Restore random states on exit, so that the following passes draw the same dropout."""
    devices, kind = ([], "cuda") if device.type == "cpu" else ([device], device.type)
    with torch.random.fork_rng(devices=devices, device_type=kind):
        yield
