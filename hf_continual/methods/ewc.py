r"""Elastic weight consolidation: important weights are held in place by springs.

Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, https://arxiv.org/abs/1612.00796.

When a task ends, the diagonal Fisher information F on its own rows tells how much each weight matters to it, and
theta* are the weights. Later tasks pay for moving away (eq. 3):

    L(theta) = L_task(theta) + lambda / 2 sum_i F_i (theta_i - theta*_i)^2,      dL/dtheta_i += lambda F_i (theta_i - theta*_i)

The gradient is added in closed form once per optimizer step, after accumulation and clipping: no graph, and the same
for any accumulation, number of processes and loss scale. It is not clipped itself.

F is measured in one pass without dropout over the rows as trained; L is the token mean of a batch or row:

    F = 1/N sum_b n_b (grad L_b)^2      "batch": over batches of n_b rows, as the published code of Spurious Forgetting
    F = 1/N sum_n (grad L_n)^2          "sample": over single rows, as in the definition; about n_b times as large

and over tasks, with k tasks in F_old: ``"mean"`` (F_new + k F_old) / (k + 1), ``"sum"`` F_new + F_old, ``"online"``
F_new + decay F_old (Schwarz et al., 2018). The anchors are the weights after the last task.

Differs from the published code: dropout is off while F is measured, the penalty is divided neither by nor
multiplied by the accumulation steps (theirs counts it once per micro-batch), and no copy of the model is kept.

Memory: 8 bytes per trainable parameter (F and theta* in float32), 4 more while F is measured; 8 on disk, handed to the
next task. On an accelerator a step also needs memory for 2^25 elements.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hf_continual.bounds import between, one_of, whole_number
from hf_continual.data.kept import FRESH
from hf_continual.methods.base import Method, Run, State
from hf_continual.methods.fisher import add_squares_, fisher_diagonal, measure_fisher
from hf_continual.paper import Paper
from hf_continual.tensors.anchors import distance
from hf_continual.tensors.flat import local
from hf_continual.tensors.whole import sharded_as, whole

__all__ = [
    "EWC",
    "add_penalty_gradients_",
    "add_squares_",
    "fisher_diagonal",
    "merged_fisher",
    "penalty",
    "penalty_gradients",
]

logger = logging.getLogger(__name__)

Tensors = Mapping[str, Tensor]
AT_ONCE = 1 << 25  # elements: bounds a step's copies on a device with little free memory
OverTasks = Literal["mean", "sum", "online"]


def penalty(params: Tensors, anchors: Tensors, fisher: Tensors, weight: float) -> Tensor:
    """The penalty as a term of the loss (eq. 3), with its graph; training adds its gradient instead.

    Args:
        params: Weights by name.
        anchors: theta*, the weights after the last task.
        fisher: F, of the same shapes; names missing from it are free.
        weight: lambda.

    Returns:
        Scalar lambda / 2 sum F (theta - theta*)^2.
    """
    terms = [(fisher[n] * (params[n] - anchors[n]).square()).sum() for n in params if n in fisher]
    return weight / 2 * sum(terms[1:], start=terms[0]) if terms else torch.zeros(())


@torch.no_grad()
def penalty_gradients(params: Tensors, anchors: Tensors, fisher: Tensors, weight: float) -> dict[str, Tensor]:
    """The gradient of `penalty` in closed form.

    Args:
        params: Weights by name, any float dtype.
        anchors: theta*, of the same shapes.
        fisher: F, of the same shapes; names missing from it have no gradient.
        weight: lambda.

    Returns:
        lambda F (theta - theta*) by name, in the dtype of F.
    """
    return {
        name: (p.to(fisher[name].dtype) - anchors[name].to(fisher[name].dtype)).mul_(fisher[name]).mul_(weight)
        for name, p in params.items()
        if name in fisher
    }


@torch.no_grad()
def add_penalty_gradients_(
    gradients: Tensors, params: Tensors, anchors: Tensors, fisher: Tensors, weight: float
) -> None:
    """Add `penalty_gradients` to gradients in place, without a copy of more than `AT_ONCE` elements or one tensor.

    Args:
        gradients: Gradients by name, any float dtype.
        params: Weights of the same names.
        anchors: theta*, float32.
        fisher: F, float32.
        weight: lambda.
    """
    names: list[str] = []
    size = 0
    for i, name in enumerate(gradients, start=1):
        names.append(name)
        size += params[name].numel()
        if size < AT_ONCE and i < len(gradients):
            continue
        moved = torch._foreach_sub([params[n].float() for n in names], [anchors[n] for n in names])
        torch._foreach_mul_(moved, [fisher[n] for n in names])
        torch._foreach_mul_(moved, weight)
        torch._foreach_add_(
            [gradients[n] for n in names], [m.to(gradients[n].dtype) for n, m in zip(names, moved, strict=True)]
        )
        names, size = [], 0


def merged_fisher(new: Tensors, old: Tensors, tasks: int, over_tasks: OverTasks, decay: float) -> dict[str, Tensor]:
    """F after a task, from the task's own F and that of earlier tasks.

    Args:
        new: F of the task's rows.
        old: F of earlier tasks; a weight may be in only one of the two.
        tasks: Number of tasks in `old`.
        over_tasks: ``"mean"``, ``"sum"`` or ``"online"``.
        decay: Of ``"online"``.

    Returns:
        F by name, for all weights in either.
    """
    if not tasks:
        return dict(new)
    if over_tasks == "mean":
        share, kept = 1 / (tasks + 1), tasks / (tasks + 1)
    else:
        share, kept = 1.0, decay if over_tasks == "online" else 1.0
    merged = {}
    for name in {**old, **new}:
        parts = [t * s for t, s in ((new.get(name), share), (old.get(name), kept)) if t is not None]
        merged[name] = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return merged


@dataclass
class EWC(Method):
    """Hold weights that mattered to earlier tasks near where those tasks left them.

    Idea: moving a weight that the old tasks' likelihood depends on costs loss; the others are free.
    Hooks: gradients, task end. Cost: one elementwise pass over the trainable weights per step; when the task ends,
    one forward and backward pass over its rows (`rows` limits it).
    Relations: with LoRA, F and theta* are those of the adapter's factors: the diagonal form of LaLoRA. A new adapter
    (``between_tasks: new_adapter``) has no earlier weights, so nothing is held. RecAdam pulls all weights alike.
    Composes with everything. Sharded weights: ``fisher="batch"`` only.

    Args:
        weight: lambda. The paper's code for language models searches 1e4 to 1e8 with ``fisher="batch"``; 5000 is the
            published default.
        fisher: ``"batch"`` squares the gradient of batches, ``"sample"`` that of single rows.
        over_tasks: How F of several tasks becomes one: ``"mean"``, ``"sum"`` or ``"online"``.
        decay: gamma of ``"online"``, between 0 and 1.
        rows: Maximum number of rows in the pass, drawn with the run's seed; None: all.
        batch_rows: Rows of a batch over all processes; None: as many as an optimizer step.
        name: Prefix of the logged values, and of the files handed to the next task.

    Raises:
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If one is out of range, or what an earlier task left does not fit the model.
    """

    weight: float = 5000.0
    fisher: Literal["batch", "sample"] = "batch"
    over_tasks: OverTasks = "mean"
    decay: float = 0.9
    rows: int | None = None
    batch_rows: int | None = None
    name: str = "ewc"  # pyrefly: ignore[bad-override]

    leaves: ClassVar[str] = "Fisher information and weights of the tasks so far"
    bytes_per_parameter: ClassVar[float] = 8.0
    paper: ClassVar[Paper] = Paper(
        "Overcoming catastrophic forgetting in neural networks",
        "Kirkpatrick et al.",
        2017,
        arxiv="1612.00796",
        venue="PNAS 2017",
    )
    _old: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _anchors: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _held: list[str] = field(default_factory=list, init=False, repr=False, compare=False)
    _tasks: int = field(default=0, init=False, repr=False, compare=False)
    _live: tuple[dict[str, Tensor], dict[str, Tensor]] = field(
        default_factory=lambda: ({}, {}), init=False, repr=False, compare=False
    )
    _after: State = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def row_sources(cls) -> tuple[str, ...]:
        """None: `rows` is a number here."""
        return ()

    def __post_init__(self) -> None:
        if self.weight != 0:
            between("EWC", "weight", self.weight, 0, float("inf"))
        one_of("EWC", "fisher", self.fisher, ("batch", "sample"))
        one_of("EWC", "over_tasks", self.over_tasks, ("mean", "sum", "online"))
        between("EWC", "decay", self.decay, 0, 1, closed="]")
        for key in ("rows", "batch_rows"):
            if getattr(self, key) is not None:
                whole_number("EWC", key, getattr(self, key))

    def load_task_state(self, state: State, run: Run) -> None:
        """Load F and theta* of the earlier tasks."""
        self._tasks = int(state["tasks"])
        self._old = {n.removeprefix("fisher/"): t for n, t in state.items() if n.startswith("fisher/")}
        self._anchors = {n.removeprefix("anchor/"): t for n, t in state.items() if n.startswith("anchor/")}
        params = run.named_parameters()
        # Now, while the weights are those that training starts from, also in a resumed run.
        self._held = [n for n in params if n in self._old and not _is_new_adapter(n, params, self._anchors)]
        if wrong := [n for n in self._held if self._old[n].shape != params[n].shape]:
            first = wrong[0]
            raise ValueError(
                f"EWC: {len(wrong)} weights have a different shape than when their importance was measured, such as {first}: "
                f"{tuple(self._old[first].shape)} then, {tuple(params[first].shape)} now. Train with the same model and "
                f"adapter, or start without what was learned: {FRESH}."
            )

    def begin_task(self, run: Run) -> None:
        """Move F and theta* of the trained weights to their device."""
        self._after = {}
        params = run.named_parameters()
        held = [n for n in self._held if n in params]
        if self._tasks and not held:
            logger.warning(
                "EWC: none of the %d trained weights was trained by an earlier task (a new adapter, or other "
                "layers): nothing is held. Continue the same weights to hold them.", len(params),
            )  # fmt: skip
        self._live = tuple(  # pyrefly: ignore[bad-assignment]
            {n: sharded_as(kept[n].to(run.device, torch.float32), params[n]) for n in held}
            for kept in (self._anchors, self._old)
        )

    def edit_gradients(self, params: Mapping[str, torch.nn.Parameter]) -> None:
        """Add lambda F (theta - theta*)."""
        anchors, fisher = self._live
        if not fisher or self.weight == 0:
            return
        grads = {n: local(p.grad) for n, p in params.items() if n in fisher and p.grad is not None}
        weights, springs, where = ({n: local(t[n].detach()) for n in grads} for t in (params, fisher, anchors))
        add_penalty_gradients_(grads, weights, where, springs, self.weight)

    def measure(self, run: Run) -> dict[str, Tensor]:
        """How far the weights are from where earlier tasks left them."""
        anchors, params = self._live[0] if self._live else {}, run.named_parameters()
        return {"distance": distance(((params[n], a) for n, a in anchors.items()), run.sum if run.is_sharded else None)}

    def end_task(self, run: Run) -> None:
        """Measure F on the task's own rows, and store the weights."""
        params = run.named_parameters()
        new, counted = measure_fisher(
            run, run.task_rows, self.fisher, self.rows, self.batch_rows, what=f"{self.name}: Fisher"
        )
        fisher = {n: whole(t).cpu() for n, t in new.items()}
        # A new adapter's weights are different from the earlier ones of the same name.
        old = {n: t for n, t in self._old.items() if n not in params or n in self._live[1]}
        fisher = merged_fisher(fisher, old, self._tasks, self.over_tasks, self.decay)
        anchors = {**self._anchors, **{n: whole(p.detach()).cpu() for n, p in params.items()}}
        self._after = {
            "tasks": self._tasks + 1,
            **{f"fisher/{n}": t for n, t in fisher.items()},
            **{f"anchor/{n}": anchors[n] for n in fisher},
        }
        logger.info("EWC: importance of %d tensors was measured on %d rows.", len(new), counted)

    def task_state(self, run: Run) -> State:
        """F and theta* of all tasks so far."""
        return self._after


def _is_new_adapter(name: str, params: Tensors, anchors: Tensors) -> bool:
    """Whether a factor belongs to an untrained adapter, although an earlier one of the same name was trained."""
    for a, b in (("lora_A", "lora_B"), ("lora_embedding_B", "lora_embedding_A")):
        if f".{a}." in name or f".{b}." in name:
            zero = name.replace(f".{a}.", f".{b}.")
            if zero in params and zero in anchors:
                return not bool(local(params[zero].detach()).any()) and bool(anchors[zero].any())
    return False
