r"""Slow weights: what a task leaves is the moving average of its weights over training, not the last of them.

Morales-Brotons, Vogels and Hendrikx, "Exponential Moving Average of Weights in Deep Learning: Dynamics and Benefits", TMLR 2024,
https://arxiv.org/abs/2411.18704.

From step s on, and then after every `every`-th step:

    slow = theta(s),        slow <- decay slow + (1 - decay) theta,        theta <- slow when the task ends

After n updates theta(s) counts for decay^n of the result. With s = 0 these are the weights that the task started from, so that the
average also stays closer to what earlier tasks left. That is wanted here, so the bias towards theta(s) is not corrected.

The average is a parameter's, as in a state dict: that of LoRA's factors A and B, not of their product. It is kept in float32, and reads
exact weights where an optimizer keeps the residuals of weights in low precision.

TRL's BEMACallback keeps no state over a resume, builds a second model, and writes it elsewhere than the trained one.

Memory: 4 bytes per trained parameter on the device (with FSDP2, for this process's shards) and, from step s on, in every checkpoint;
room for the copies of one bucket, 2 times 2^22 elements or 2 times the largest parameter. Cost: the weights and the average are read and the
average is written, once per `every` steps; one pass over both when the task ends.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hf_continual.bounds import between, whole_number
from hf_continual.methods.base import Method, Run, State
from hf_continual.paper import Paper
from hf_continual.tensors.flat import Flat

__all__ = ["SlowWeights", "averaged"]

logger = logging.getLogger(__name__)


def averaged(slow: Tensor, weights: Tensor, decay: float) -> Tensor:
    """One update of the average, in place.

    Args:
        slow: The average so far, float32.
        weights: The weights now, float32, of the same shape.
        decay: Share of the average that stays.

    Returns:
        `slow`, now decay slow + (1 - decay) weights.
    """
    return slow.lerp_(weights, 1.0 - decay)


@dataclass
class SlowWeights(Method):
    """Leave the exponential moving average of the weights over the task, in place of the last weights.

    Idea: the average cancels the noise of single steps and stays nearer to where the task started. Hooks: after step, task end.
    Cost: see the module's docstring; training itself is plain fine-tuning, bit for bit, and gauges and evaluations during
    training see the weights that are trained. Relations: TaskVector subtracts early movement instead; averaging finished models
    is a merge. Give it before methods that measure the trained weights when a task ends (EWC, TaSL): these then see the average.
    Composes with everything.

    Args:
        decay: Share of the average that stays at an update; the average reaches back over about 1 / (1 - decay) updates. Choose it
            for the length of the task: 0.999 over 200 steps leaves 82 % of the weights at its start. 0 keeps no average, which is
            plain fine-tuning, bit for bit.
        every: Steps between updates. 10 with decay d^10 costs a tenth of 1 with d, and gives nearly the same.
        warmup: Share of the run before the average starts, from the weights of that step.
        name: Prefix of its files.

    Raises:
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If one is out of range, or no parameter is trained.
    """

    decay: float = 0.99
    every: int = 1
    warmup: float = 0.0
    name: str = "slow_weights"  # pyrefly: ignore[bad-override]

    bytes_per_parameter: ClassVar[float] = 4.0
    paper: ClassVar[Paper] = Paper(
        "Exponential Moving Average of Weights in Deep Learning: Dynamics and Benefits",
        "Morales-Brotons et al.",
        2024,
        arxiv="2411.18704",
        venue="TMLR 2024",
    )
    _flat: Flat | None = field(default=None, init=False, repr=False, compare=False)
    _slow: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    _resumed: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        note = "It is the share of the average that stays; 1 would never take up a weight."
        between("SlowWeights", "decay", self.decay, 0, 1, "[", note)
        whole_number("SlowWeights", "every", self.every, unit="steps")
        between("SlowWeights", "warmup", self.warmup, 0, 1, "[", "It is the share of the run before the average.")

    def begin_task(self, run: Run) -> None:
        """Start the average where it covers the whole run, and log what it will be of."""
        if not self._resumed:  # also when an attempt with larger batches ran out of memory
            self._flat = self._slow = None
        self._resumed = False
        if not self.decay:
            return
        start, last = self._first(run), run.max_steps
        if start + self.every > last:
            raise ValueError(
                f"SlowWeights(every={self.every}, warmup={self.warmup:g}): the run has {last} steps, and the average would start after "
                f"step {start} and take up none of them. Lower every or warmup, or train for more steps."
            )
        share = self.decay ** ((last - start) // self.every)
        logger.info("%s: the weights after step %d count for %.3g of the result.", self.name, start, share)
        if self._slow is None and run.step >= start:
            self._start(run)

    def _first(self, run: Run) -> int:
        """The step after which the average starts; 0 is the start of training."""
        return round(self.warmup * run.max_steps)

    def _layout(self, run: Run) -> Flat:
        if self._flat is None:
            params = run.named_parameters()
            if not params:
                raise ValueError("SlowWeights: no parameter is trained, so there is nothing to average. Freeze less.")
            self._flat = Flat(params, run.optimizer)
        return self._flat

    def _start(self, run: Run) -> None:
        flat = self._layout(run)
        self._slow = flat.zeros()
        flat.copy_weights(self._slow)

    @torch.no_grad()
    def end_step(self, run: Run) -> None:
        """Start the average, or update it."""
        since = run.step - self._first(run)
        if not self.decay or since < 0:
            return
        if self._slow is None:
            self._start(run)
        elif since % self.every == 0:
            flat = self._layout(run)
            for bucket in flat.buckets:
                averaged(bucket.of(self._slow), flat.weights(bucket), self.decay)

    def weights_replaced(self, run: Run) -> None:
        """Start the average again, from the weights that were put back."""
        if self._slow is not None:
            self._start(run)

    @torch.no_grad()
    def end_task(self, run: Run) -> None:
        """Put the average in place of the weights."""
        if self._slow is None:
            if self.decay:
                logger.warning("%s: training ended before step %d; nothing was averaged.", self.name, self._first(run))
            return
        flat = self._layout(run)
        for bucket in flat.buckets:
            flat.write(bucket, bucket.of(self._slow))
        self._flat = self._slow = None

    def state_dict(self, run: Run) -> State:
        """The average, once it has started."""
        return {} if self._slow is None else self._layout(run).named(self._slow, "", run.is_main_process)

    def load_state_dict(self, state: State, run: Run) -> None:
        """Load the average."""
        if state:
            flat = self._layout(run)
            self._slow = flat.zeros()
            flat.fill(self._slow, state, "")
            self._resumed = True
