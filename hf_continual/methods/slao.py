r"""SLAO: one LoRA adapter for all tasks, merged with what each task learned, less with every task.

Qiao and Mahdavi, "Merge before Forget: A Single LoRA Continual Learning via Continual Merging", ICLR 2026,
https://arxiv.org/abs/2512.23017.

Task i starts from an orthonormal basis of the rows of A that the task before ended with, and from its B as trained (not merged):

    Q R = qr(A_(i-1)^T),     A <- Q^T,     B <- B_(i-1)

After training to A_i, B_i, A is replaced and B is averaged with what the earlier tasks left:

    A_merged <- A_i,     B_merged <- B_merged + (B_i - B_merged) / sqrt(i)

The first task is plain LoRA. The saved adapter is (A_merged, B_merged); B_i goes to the next task as the method's state.

Chosen here: Q's columns have the sign that makes the diagonal of R positive, so that an A with orthonormal rows stays as
it is and the result does not depend on the library that decomposes. The paper names A's scale nowhere: rows of Q have length 1,
fresh rows about 0.58.

Embeddings' adapters, DoRA's magnitudes and `modules_to_save` are trained further as usual and not merged.

Memory: B three times in main memory (merged, as the task before trained it, and as this task did), and once in the state that is
handed on; with A and B of one size about 6 bytes per parameter of the adapter. Cost: nothing per step; one QR of each A per task.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn

from hf_continual.bounds import at_least
from hf_continual.data.kept import FRESH
from hf_continual.methods.base import Method, Run, State
from hf_continual.paper import Paper
from hf_continual.tasks import Task
from hf_continual.tensors.adapters import FACTOR, factor_pairs, fresh_factors
from hf_continual.tensors.flat import local
from hf_continual.tensors.whole import sharded_as, whole

__all__ = ["SLAO", "merged", "orthonormal"]

logger = logging.getLogger(__name__)


def orthonormal(A_RD: Tensor) -> Tensor:
    """An orthonormal basis of the rows of A: Q^T of the QR decomposition of A^T, with positive diagonal of R.

    Args:
        A_RD: Factor A, (R, D) with R at most D.

    Returns:
        (R, D) with orthonormal rows that span the rows of A; float32.

    Raises:
        ValueError: If A has more rows than columns.
    """
    if A_RD.shape[0] > A_RD.shape[1]:
        raise ValueError(
            f"SLAO: {A_RD.shape[0]} rows of A with {A_RD.shape[1]} columns cannot be orthonormal. Give a rank of at most "
            f"{A_RD.shape[1]}, or SLAO(orthogonal=False)."
        )
    Q_DR, R_RR = torch.linalg.qr(A_RD.float().mT)
    return (Q_DR * torch.where(R_RR.diagonal() < 0, -1.0, 1.0)).mT.contiguous()


def merged(B_merged: Tensor, B_task: Tensor, task: int, power: float = 0.5) -> Tensor:
    """Average of a task's B with that of the tasks before.

    Args:
        B_merged: What the earlier tasks left.
        B_task: B as trained on the task, of the same shape.
        task: i, the number of the task, counted from 1.
        power: lambda(i) = i^-power.

    Returns:
        B_merged + lambda(i) (B_task - B_merged), float32; exactly `B_task` where lambda is 1.
    """
    return torch.lerp(B_merged.float(), B_task.float(), float(task) ** -power)


@dataclass
class SLAO(Method):
    """Train one LoRA adapter through all tasks, and average its B over them.

    Idea: A barely differs between tasks and can be replaced, B holds what a task learned and is averaged. Memory does not grow
    with tasks. Hooks: task end. Cost: nothing per step. Relations: TaskVector edits weights at the end of a task, too; `o_lora`
    and `between_tasks: new_adapter` keep an adapter per task, while SLAO needs the same one trained further, which is what a plan
    does by default. Methods that come later in the list see the merged weights when a task ends. Composes with everything.

    Args:
        power: p of lambda(i) = i^-p; 0.5 is the paper. 0 merges nothing: a task's B replaces the one before.
        orthogonal: Whether a task starts from an orthonormal A.
        name: Prefix of the logged values, and of the files handed to the next task.

    Raises:
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If one is out of range, or the model has no LoRA adapter.
    """

    power: float = 0.5
    orthogonal: bool = True
    name: str = "slao"  # pyrefly: ignore[bad-override]

    leaves: ClassVar[str] = "factors B as trained on the last task, and the number of tasks"
    bytes_per_parameter: ClassVar[float] = 6.0  # three B in float32, each about half of an adapter
    paper: ClassVar[Paper] = Paper(
        "Merge before Forget: A Single LoRA Continual Learning via Continual Merging",
        "Qiao and Mahdavi",
        2025,
        arxiv="2512.23017",
        venue="ICLR 2026",
    )
    _tasks: int = field(default=0, init=False, repr=False, compare=False)
    _before: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _trained: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _merged: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        at_least("SLAO", "power", self.power, 0)

    def reads_reference(self) -> bool:
        """Always: it needs the adapter that training starts from."""
        return True

    def prepare_model(self, model: nn.Module, task: Task) -> None:
        """Refuse a model without LoRA."""
        if not isinstance(model, PeftModel) or not any(FACTOR.match(name) for name, _ in model.named_parameters()):
            raise ValueError(
                f"SLAO merges LoRA adapters, but the model is a {type(model).__name__} without one. Give "
                f"peft_config=LoraConfig(...) (in a plan: peft)."
            )

    def load_task_state(self, state: State, run: Run) -> None:
        """Load B as trained on the task before, unless this task has a new adapter."""
        params = run.named_parameters()
        found = {n.removeprefix("B/"): t for n, t in state.items() if n.startswith("B/")}
        pairs = factor_pairs(params)
        if len(fresh_factors(params)) == 2 * len(pairs):
            logger.warning(
                "SLAO: this task has a new adapter, so nothing is merged with that of the %d tasks before, and it counts as a first "
                "task. Train the same adapter further (between_tasks: continue in a plan, no peft_config in a script).",
                int(state["tasks"]),
            )  # fmt: skip
            return
        for layer, (_, b) in pairs.items():
            if layer in found and found[layer].shape != params[b].shape:
                raise ValueError(
                    f"SLAO: factor B of {layer} is {tuple(params[b].shape)}, that of the task before {tuple(found[layer].shape)}: they "
                    f"belong to different adapters. Start from the adapter that the task left, or without what was learned: "
                    f"{FRESH}."
                )
        self._tasks, self._before = int(state["tasks"]), found

    @torch.no_grad()
    def prepare(self, run: Run) -> None:
        """Remember the merged B, and put the adapter where the task starts, also in a resumed run."""
        params = run.named_parameters()
        self._merged = {}
        for layer, (a, b) in factor_pairs(params).items():
            if layer not in self._before:
                continue
            A_RD, B_OR = params[a].detach(), params[b].detach()
            self._merged[layer] = B_OR.to("cpu", torch.float32, copy=True)
            B_OR.copy_(self._before[layer])
            if self.orthogonal:
                A_RD.copy_(orthonormal(A_RD))
        if self._tasks:
            logger.info("%s: task %d; B of %d layers will be merged.", self.name, self._tasks + 1, len(self._merged))

    @torch.no_grad()
    def end_task(self, run: Run) -> None:
        """Keep B as trained for the next task, and merge it."""
        params = run.named_parameters()
        for layer, (_, b) in factor_pairs(params).items():
            trained = whole(params[b].detach())
            self._trained[layer] = trained.to("cpu", copy=True)
            if layer in self._merged:
                found = merged(self._merged[layer].to(trained.device), trained, self._tasks + 1, self.power)
                local(params[b].detach()).copy_(local(sharded_as(found, params[b])))

    def task_state(self, run: Run) -> State:
        """B as trained on this task, and the number of tasks so far."""
        return {"tasks": self._tasks + 1, **{f"B/{layer}": B.contiguous() for layer, B in self._trained.items()}}
