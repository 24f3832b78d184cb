r"""Gradient projection: remove from the gradients the direction in which every run of a new task starts.

Zheng et al., "Spurious Forgetting in Continual Learning of Language Models", ICLR 2025, https://arxiv.org/abs/2501.13453.

The first steps on a new task undo how the model answers old ones, always in roughly the same direction. It is found by
k preliminary runs from the same start, each of n steps, as their mean movement between two of their steps:

    d = 1/k sum_i (theta_i(n) - theta_i(m)),        then in each step, for each row r of a weight:    g_r <- g_r - (g_r . d_r) d_r / |d_r|^2

One-dimensional weights are projected as a whole. `literal=True` is the formula in the published code's comments, which
subtracts d_r cos(g_r, d_r) from a row and d (g . d) / |d| from a vector: not a projection, and tiny if d is short.

The preliminary runs are made here: a fresh AdamW with the run's settings and its peak learning rate, on different draws
of the task's own rows. Then weights and random states are restored, bit for bit.

Memory: 4 bytes per trainable parameter for the directions; during the preliminary runs, their AdamW's moments in place
of those of the run's optimizer, and the weights in main memory. Cost: k n steps before the first one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_continual import stopping
from hf_continual.bounds import between, one_of, whole_number
from hf_continual.data.distributed import from_first
from hf_continual.methods.base import Method, Run, State
from hf_continual.methods.unfinished import Unfinished
from hf_continual.paper import Paper
from hf_continual.tensors.flat import local
from hf_continual.tensors.layers import in_attention
from hf_continual.tensors.whole import sharded_as, whole

__all__ = ["GradientProjection", "project"]

logger = logging.getLogger(__name__)


def project(grad: Tensor, direction: Tensor, literal: bool = False) -> Tensor:
    """Remove a direction from a gradient, row by row; a vector is one row.

    Args:
        grad: g, (rows, columns) or more dimensions, with rows along the last; or (D,).
        direction: d, of the same shape. A row of zeros removes nothing.
        literal: Use the published formula instead of the projection.

    Returns:
        A new tensor of the shape and dtype of `grad`.
    """
    g, d = grad.float(), direction.float()
    along = (g * d).sum(dim=-1, keepdim=True)
    length = torch.linalg.vector_norm(d, dim=-1, keepdim=True)
    if not literal:
        divisor = length.square()
    elif grad.dim() == 1:
        divisor = length
    else:
        divisor = length * torch.linalg.vector_norm(g, dim=-1, keepdim=True)
    return (g - d * (along / divisor).nan_to_num(0.0, 0.0, 0.0)).to(grad.dtype)


@dataclass
class GradientProjection(Method):
    """Learn without moving along the direction in which every run of the task would start.

    Idea: the common part of the first steps on a new task undoes the alignment of old tasks, and the task can be
    learned without it. Hooks: gradients. Cost: ``runs * steps`` steps before the first one, two elementwise passes over
    the projected weights per step. Adam's division by its second moment rotates a step away from its gradient, so that
    weights may move a little along the direction; with SGD they do not.
    Relations: FreezeLayers and a short first task are the paper's cheaper remedies, TaskVector the correction
    afterwards. It acts in every task it is given to. Composes with everything.

    Args:
        runs: k, number of preliminary runs; 0 is plain fine-tuning.
        steps: n, optimizer steps of each run.
        since: m, the step from which their movement counts; None: two thirds of `steps`, like the paper's 100 of 150.
        layers: ``"attention"`` projects weights of attention modules, ``"all"`` every trained weight.
        literal: Use the published formula instead of the projection, see `project`.
        name: Prefix of the logged values, and of its files.

    Raises:
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If one is out of range, or no weight of an attention module is trained.
    """

    runs: int = 10
    steps: int = 150
    since: int | None = None
    layers: Literal["attention", "all"] = "attention"
    literal: bool = False
    name: str = "gradient_projection"  # pyrefly: ignore[bad-override]

    bytes_per_parameter: ClassVar[float] = 4.0
    paper: ClassVar[Paper] = Paper(
        "Spurious Forgetting in Continual Learning of Language Models",
        "Zheng et al.",
        2025,
        arxiv="2501.13453",
        venue="ICLR 2025",
    )
    _loaded: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _live: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _add_up: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        whole_number("GradientProjection", "runs", self.runs, least=0)
        whole_number("GradientProjection", "steps", self.steps)
        if self.since is not None:
            whole_number("GradientProjection", "since", self.since, least=0)
            between(
                "GradientProjection", "since", self.since, 0, self.steps, "[", "It is one of the preliminary steps."
            )
        one_of("GradientProjection", "layers", self.layers, ("attention", "all"))

    @property
    def first_counted(self) -> int:
        """The m in use."""
        return 2 * self.steps // 3 if self.since is None else self.since

    def extra_steps(self, steps: int) -> int:
        """The preliminary runs."""
        return self.runs * self.steps

    def begin_task(self, run: Run) -> None:
        """Make the preliminary runs, unless a checkpoint or an interrupted run has their directions."""
        params = run.named_parameters()
        chosen = self._chosen(run, params)
        self._add_up = run.sum if run.is_sharded else None
        if not self.runs:
            return
        if not self._loaded:
            found = self._found(run, chosen)
            self._loaded = {name: ready(d, self.literal) for name, d in found.items()}
        self._live = {n: sharded_as(d.to(run.device), params[n]) for n, d in self._loaded.items()}
        self._loaded = {}

    def _chosen(self, run: Run, params: Mapping[str, nn.Parameter]) -> list[str]:
        if self.layers == "all":
            return list(params)
        attending = in_attention(run.model)
        chosen = [name for name in params if name in attending]
        if not chosen:
            raise ValueError(
                f"GradientProjection(layers='attention'): none of the {len(params)} trained weights belongs to an "
                f"attention module. Use layers='all', or freeze less."
            )
        return chosen

    def _found(self, run: Run, chosen: list[str]) -> dict[str, Tensor]:
        """Directions by name, whole tensors on the CPU."""
        params, kept = run.named_parameters(), Unfinished(run, self.name, self.describe())
        done, total = kept.read()
        if not total:
            total = {n: torch.zeros(params[n].shape) for n in chosen}
        for i in tqdm(range(done, self.runs), desc=f"{self.name}: preliminary runs", disable=not run.is_main_process):
            with put_back(params, run.device):
                for name, moved in self._preliminary(run, i, chosen).items():
                    total[name] += whole(moved).cpu() / self.runs
            kept.write(i + 1, total)
            if i + 1 < self.runs and (why := from_first(stopping.asked)) is not None:
                stopping.stop(f"after {i + 1} of {self.runs} preliminary runs", why)
        run.zero_grad()
        logger.info(
            "%s: directions of %d tensors come from %d runs of %d steps.", self.name, len(chosen), self.runs, self.steps
        )
        return total

    def _preliminary(self, run: Run, which: int, chosen: list[str]) -> dict[str, Tensor]:
        """Make one run from the current weights; return its movement between the two steps, float32. Moves the weights."""
        params, settings = run.named_parameters(), {**run.optimizer_defaults(), "lr": run.learning_rate}
        optimizer: Any = torch.optim.AdamW(params.values(), **settings)  # pyrefly: ignore[bad-argument-type]
        before: dict[str, Tensor] = {}
        for step in range(self.steps):
            if step == self.first_counted:
                before = {n: params[n].detach().float().clone() for n in chosen}
            run.gradients(run.micro_batches(run.task_rows, which * self.steps + step))
            run.update(optimizer.step)
            run.zero_grad()
        return {n: params[n].detach().float() - start for n, start in before.items()}

    @torch.no_grad()
    def edit_gradients(self, params: Mapping[str, nn.Parameter]) -> None:
        """Remove the directions from the gradients."""
        spread: list[tuple[Tensor, Tensor]] = []
        for name, direction in self._live.items():
            if (grad := params[name].grad) is None:
                continue
            g, d = local(grad), local(direction)
            if g.dim() == 1 and self._add_up is not None:
                spread.append((g, d))
                continue
            along = (g * d).sum(dim=-1, keepdim=True)
            if self.literal and g.dim() > 1:
                along = along / torch.linalg.vector_norm(g.float(), dim=-1, keepdim=True).clamp(min=1e-30)
            g.sub_((d * along).to(g.dtype))
        if spread and self._add_up is not None:  # sharded vectors: one sum over the processes for all of them
            sums = self._add_up(torch.stack([(g.float() * d).sum() for g, d in spread]))
            for (g, d), along in zip(spread, sums, strict=True):
                g.sub_((d * along).to(g.dtype))

    def state_dict(self, run: Run) -> State:
        """The directions, scaled as `edit_gradients` uses them."""
        return {name: whole(d).cpu() for name, d in self._live.items()}

    def load_state_dict(self, state: State, run: Run) -> None:
        """Load the directions."""
        self._loaded = dict(state)

    def end_task(self, run: Run) -> None:
        """Drop the directions: the next task has its own."""
        Unfinished(run, self.name, self.describe()).clear()
        self._live = {}


def ready(direction: Tensor, literal: bool) -> Tensor:
    """Scale a direction so that ``g - d (d . g)`` is the projection or, over the length of g_r, the published formula."""
    length = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    return torch.where(length > 0, direction / (length.sqrt() if literal else length), 0.0)


@contextmanager
def put_back(params: Mapping[str, nn.Parameter], device: torch.device) -> Iterator[None]:
    """Restore weights and random states on exit."""
    start = {n: local(p.detach()).to("cpu", copy=True) for n, p in params.items()}
    devices, kind = ([], "cuda") if device.type == "cpu" else ([device], device.type)
    with torch.random.fork_rng(devices=devices, device_type=kind):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in params.items():
                    local(p.detach()).copy_(start[name])
