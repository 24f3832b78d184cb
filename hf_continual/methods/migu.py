r"""MIGU: update only the output neurons that respond most to a batch.

Du et al., "Unlocking Continual Learning Abilities in Language Models", EMNLP Findings 2024,
https://arxiv.org/abs/2406.17245.

Tasks activate different neurons of a linear layer. The magnitude of output neuron j is summed over all tokens of an
optimizer step, and only the rows of the weight that belong to the largest magnitudes keep their gradient (sec. 3):

    a_j = sum over tokens |(W x + b)_j|,     mask_j = a_j >= quantile(a, 1 - share),     dL/dW_j <- mask_j dL/dW_j

Biases keep theirs. The masks are applied after accumulation and clipping, and come from forward passes that are made
anyway.

With LoRA the published code masks nothing (its branch is never taken). Here rows of B are masked by the combined output
W x + s B A x, as the rest of that code computes it; `mask_a` also masks rows of A by |A x|.

Differs from the published code: padding does not count (theirs includes it), nor does a recomputed forward pass under
gradient checkpointing, and the language-model head is not masked: its outputs are never formed by the fused loss.

Memory: two float32 values per output neuron. Only the number of tasks is kept between tasks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from hf_continual.bounds import between
from hf_continual.methods.base import Method, Run, State
from hf_continual.paper import Paper
from hf_continual.tensors.importance import share_rank
from hf_continual.tensors.outputs import MaskedWeight, OutputSums, masked_weights
from hf_continual.tensors.selection import value_of_rank

__all__ = ["MIGU", "output_mask"]

logger = logging.getLogger(__name__)


def output_mask(activation_sum_O: Tensor, share: float) -> Tensor:
    """Select the output neurons with the largest activations.

    Args:
        activation_sum_O: a, summed magnitude of each output neuron, (O,); or for several layers, (L, O).
        share: Fraction to keep, in (0, 1]; 1 minus the threshold of the paper.

    Returns:
        bool of the same shape, True at and above the linearly interpolated quantile: equal values are kept together.

    Raises:
        ValueError: If the fraction is out of range.
    """
    between("output_mask", "share", share, 0, 1, "]", "It is the fraction of output neurons that is updated.")
    count = activation_sum_O.shape[-1]
    # The smallest value that is not below the quantile is at (1 - share) (count - 1), rounded up.
    rank = count - 1 - share_rank(count, 1 - share) if share < 1 else 0
    return activation_sum_O >= value_of_rank(activation_sum_O, rank)


@dataclass
class MIGU(Method):
    """Update only the rows of each weight whose output neurons respond most to the batch.

    Idea: the neurons that respond identify a task, without task labels and without old rows.
    Hooks: after forward, gradients. Cost: one reduction over the outputs of each linear layer
    and forward pass, a selection per step; no extra forward pass.
    Relations: nothing is kept of earlier tasks, so it can be added to replay, EWC or O-LoRA. AdamW's momentum and
    weight decay continue in masked rows, as in the paper. Composes with everything.

    It masks the weights of trainable linear layers (for LoRA the factors). Embeddings, norms, biases, experts that
    are one tensor, and the language-model head are updated as usual.

    Args:
        share: Fraction of the output neurons that is updated; the paper's scripts use 0.3 (threshold 0.7).
        mask_a: Whether to mask rows of LoRA's A too, by |A x|.
        first_task: Whether to mask the first task too; the paper starts with the second.
        name: Prefix of the logged values, and of the files handed to the next task.

    Raises:
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If one is out of range, or no linear layer of the model is trained.
    """

    share: float = 0.3
    mask_a: bool = False
    first_task: bool = False
    name: str = "migu"  # pyrefly: ignore[bad-override]

    leaves: ClassVar[str] = "number of tasks so far"
    droppable: ClassVar[bool] = True
    outlives_merging: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Unlocking Continual Learning Abilities in Language Models",
        "Du et al.",
        2024,
        arxiv="2406.17245",
        venue="EMNLP Findings 2024",
    )
    _tasks: int = field(default=0, init=False, repr=False, compare=False)
    _run: Run | None = field(default=None, init=False, repr=False, compare=False)
    _sums: OutputSums | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        between("MIGU", "share", self.share, 0, 1, closed="]")

    def needs_earlier_task(self) -> bool:
        """Not where the first task is masked too."""
        return not self.first_task

    def load_task_state(self, state: State, run: Run) -> None:
        """Note that this is not the first task."""
        self._tasks = int(state["tasks"])

    def begin_task(self, run: Run) -> None:
        """Find the weights to mask and hook their layers."""
        self.release()
        if self.share == 1:
            return
        if not (self.first_task or self._tasks or run.task.index):
            logger.info("MIGU: the first task is plain training; first_task=True masks it too.")
            return
        weights = masked_weights(run.model, self.mask_a)
        if not weights:
            raise ValueError(
                "MIGU: no weight of a linear layer is trained, so there are no output neurons to mask. Freeze less, or adapt linear "
                "layers (LoraConfig(target_modules='all-linear'))."
            )
        self._run, self._sums = run, OutputSums(run.model, weights, run.device)

    def after_forward(self, run: Run) -> None:
        """Count this forward pass."""
        if self._sums is not None:
            self._sums.count()

    @torch.no_grad()
    def edit_gradients(self, params: Mapping[str, nn.Parameter]) -> None:
        """Mask the rows of the gradients."""
        if self._sums is None or self._run is None:
            return
        for members, sums_LO in self._sums.groups(self._run.sum):
            kept_LO = output_mask(sums_LO, self.share)
            for weight, kept_O in zip(members, kept_LO, strict=True):
                _mask(weight, kept_O)
        self._sums.clear()

    def release(self) -> None:
        """Remove the hooks."""
        if self._sums is not None:
            self._sums.remove()
        self._run = self._sums = None

    def task_state(self, run: Run) -> State:
        """The number of tasks so far."""
        return {"tasks": self._tasks + 1}


def _mask(weight: MaskedWeight, kept_O: Tensor) -> None:
    grad: Any = weight.param.grad
    if grad is None:
        return
    mask = (kept_O.view(-1, 1) if weight.dim == 0 else kept_O.view(1, -1)).to(grad.dtype)
    if isinstance(grad, DTensor):
        mesh = grad.device_mesh
        mask = DTensor.from_local(mask, mesh, [Replicate()] * mesh.ndim, run_check=False)
        if weight.dim == 0:
            mask = mask.redistribute(placements=grad.placements)  # FSDP2 shards by rows; each process takes its own
    grad.mul_(mask)
