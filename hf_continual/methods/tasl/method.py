r"""TaSL: after a task, every part of the model takes the weights of the side that needs it.

Feng et al., "TaSL: Continual Dialog State Tracking via Task Skill Localization and Consolidation", ACL 2024,
https://arxiv.org/abs/2408.09857, and its form for LoRA, https://arxiv.org/abs/2408.05200 ("TasLoRA").

While a task is learned, the importance of every weight is averaged over the steps (`hf_continual.tensors.importance`):

    I <- b1 I + (1 - b1) |w g|,     U <- b2 U + (1 - b2) | |w g| - I |,     score = I U

When it ends, the scores become one number per unit, and the weights are mixed unit by unit with those that the task started
from (`consolidation`). Importance is accumulated and handed to the next task; no old row is read.

Differs from the published code: every step is measured (theirs skips the first), steps with gradients that are not
finite change nothing, and the run itself keeps the weights before the task instead of reading them from a folder.

Memory: 8 bytes per trainable parameter for I and U; from the second task on also the weights before the task, in main
memory. Handed on: one number per tensor or rank.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hf_continual.bounds import at_least, between, one_of
from hf_continual.data.kept import FRESH
from hf_continual.methods.base import Method, Run, State
from hf_continual.methods.tasl.consolidation import (
    PREVIOUS,
    accumulate,
    mixed,
    orthonormality_gradient,
    present_rank_shares,
    present_shares,
    rank_scores,
)
from hf_continual.paper import Paper
from hf_continual.tensors.adapters import factor_pairs, fresh_factors
from hf_continual.tensors.flat import Flat, local
from hf_continual.tensors.importance import Order, record_step_, scores
from hf_continual.tensors.whole import sharded_as

logger = logging.getLogger(__name__)


@dataclass
class TaSL(Method):
    """Mix the weights after a task with those before it, by their importance to the task and to earlier ones.

    Idea: tensors that only old tasks need go back, those that only the new one needs stay, and the others are mixed.
    Hooks: after step, task end, gradients for `orthogonality`. Cost: one elementwise pass over the trainable weights per
    step; when the task ends, only the mixing.
    Relations: KIF does the same for single weights every few steps, and remeasures old tasks on a buffer. The first
    task is plain fine-tuning. A new adapter (``between_tasks: new_adapter``) has no earlier weights, so nothing is mixed.
    The mixing happens at the end of a task: methods later in the list see the mixed weights. Composes with
    everything.

    Args:
        units: ``"tensor"`` (TaSL: each factor of an adapter, or each weight) or ``"rank"`` (TasLoRA: each rank of each
            adapter; weights that are not factors stay as trained).
        share: Fraction of the tensors that matter to a side.
        previous_weight: Weight of earlier tasks if a tensor matters to both sides, and in the accumulated importance.
        temperature: tau of ``units="rank"``.
        beta1: Decay of the importance.
        beta2: Decay of its uncertainty.
        order: Taylor terms of the sensitivity.
        orthogonality: Weight of the mean of |P P^T - I|_F over all factors (rows of A, columns of B); TasLoRA uses 0.1.
        strength: Fraction of the way from the trained to the mixed weights; 1 is the paper, 0 only measures.
        name: Prefix of the logged values, and of the files handed to the next task.

    Raises:
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If one is out of range, or what an earlier task left does not fit the model.
    """

    units: Literal["tensor", "rank"] = "tensor"
    share: float = 0.2
    previous_weight: float = PREVIOUS
    temperature: float = 0.25
    beta1: float = 0.85
    beta2: float = 0.85
    order: Order = "first"
    orthogonality: float = 0.0
    strength: float = 1.0
    name: str = "tasl"  # pyrefly: ignore[bad-override]

    leaves: ClassVar[str] = "importance of each tensor or rank to the tasks so far"
    bytes_per_parameter: ClassVar[float] = 8.0
    paper: ClassVar[Paper] = Paper(
        "TaSL: Continual Dialog State Tracking via Task Skill Localization and Consolidation",
        "Feng et al.",
        2024,
        arxiv="2408.09857",
        venue="ACL 2024",
    )
    _old: State = field(default_factory=dict, init=False, repr=False, compare=False)
    _held: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    _start: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _after: State = field(default_factory=dict, init=False, repr=False, compare=False)
    _flat: Flat | None = field(default=None, init=False, repr=False, compare=False)
    _kept: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _resumed: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        one_of("TaSL", "units", self.units, ("tensor", "rank"))
        one_of("TaSL", "order", self.order, ("first", "second", "mixed"))
        between("TaSL", "share", self.share, 0, 1, "]")
        for key in ("beta1", "beta2"):
            between("TaSL", key, getattr(self, key), 0, 1)
        for key in ("previous_weight", "strength"):
            between("TaSL", key, getattr(self, key), 0, 1, "[]")
        between("TaSL", "temperature", self.temperature, 0, float("inf"))
        at_least("TaSL", "orthogonality", self.orthogonality, 0)

    def reads_reference(self) -> bool:
        """True from the second task on: it needs the weights before the task."""
        return True

    def prepare_model(self, model: nn.Module, task: Any) -> None:
        """Refuse options that need an adapter's factors on a model without an adapter."""
        asked = "units='rank'" if self.units == "rank" else "orthogonality" if self.orthogonality else ""
        if asked and not factor_pairs(dict(model.named_parameters())):
            raise ValueError(
                f"TaSL({asked}) works on the factors of LoRA adapters, and the model has none. Give "
                f"peft_config=LoraConfig(...) (in a plan: peft), or use units='tensor' without orthogonality."
            )

    def load_task_state(self, state: State, run: Run) -> None:
        """Load the importance to the earlier tasks."""
        if state["units"] != self.units:
            raise ValueError(
                f"TaSL: the previous task measured importance by {state['units']}, but this run has units={self.units!r}. Use "
                f"units={state['units']!r}, or start without what was learned: {FRESH}."
            )
        params = run.named_parameters()
        fresh = fresh_factors(params)
        held = [n for n in params if n in state["shapes"] and n not in fresh]
        if wrong := [n for n in held if list(params[n].shape) != state["shapes"][n]]:
            first = wrong[0]
            raise ValueError(
                f"TaSL: {len(wrong)} weights have a different shape than when their importance was measured, such as {first}: "
                f"{tuple(state['shapes'][first])} then, {tuple(params[first].shape)} now. Train with the same model and "
                f"adapter, or start without what was learned: {FRESH}."
            )
        self._old, self._held = state, set(held)

    def prepare(self, run: Run) -> None:
        """Remember the weights before the task, also in a resumed run."""
        params = run.named_parameters()
        if self._old and not self._held:
            logger.warning(
                "TaSL: none of the %d trained weights was trained by an earlier task (a new adapter, or other "
                "layers): nothing is mixed. Continue the same weights to mix them.", len(params),
            )  # fmt: skip
        if self.strength:
            self._start = {n: params[n].detach().to("cpu", copy=True) for n in self._held}

    def begin_task(self, run: Run) -> None:
        """Allocate the averages, unless a checkpoint has filled them."""
        self._after = {}
        if self.orthogonality and run.is_sharded:
            raise ValueError(
                "TaSL(orthogonality=...) needs whole factors, and they are sharded over processes. Leave it out, or use DDP."
            )
        if not self._resumed:
            self._set_up(run)
        self._resumed = False

    def _set_up(self, run: Run) -> None:
        self._flat = Flat(run.named_parameters(), run.optimizer)
        self._kept = {"importance": self._flat.zeros(), "uncertainty": self._flat.zeros()}
        self._add_up = run.sum if run.is_sharded else None

    @torch.no_grad()
    def edit_gradients(self, params: Mapping[str, nn.Parameter]) -> None:
        """Add the gradient of the regulariser."""
        if not self.orthogonality:
            return
        pairs = factor_pairs(params).values()
        alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for a, b in pairs:
            for p, rows in ((params[a], params[a].detach()), (params[b], params[b].detach().mT)):
                if p.grad is not None:
                    alike.setdefault(rows.shape, []).append((p.grad if rows.shape == p.shape else p.grad.mT, rows))
        weight = self.orthogonality / (2 * len(pairs))
        for members in alike.values():
            found = orthonormality_gradient(torch.stack([rows.float() for _, rows in members])).mul_(weight)
            for grad, more in zip((g for g, _ in members), found, strict=True):
                grad.add_(more.to(grad.dtype))

    def after_step(self, run: Run) -> None:
        """Record the new weights and the clipped gradient that moved them."""
        assert self._flat is not None
        record_step_(
            self._flat,
            self._kept["importance"],
            self._kept["uncertainty"],
            self.beta1,
            self.beta2,
            self.order,
            self._add_up,
        )

    @torch.no_grad()
    def end_task(self, run: Run) -> None:
        """Mix the weights with those before the task, and accumulate the importance."""
        assert self._flat is not None
        params = run.named_parameters()
        now, then, pairs = self._importance(run), dict(self._old.get("importance", {})), factor_pairs(params)
        for unit in now:  # a new adapter's units are not the earlier ones of the same name
            if (unit if self.units == "tensor" else pairs[unit][0]) not in self._held:
                then.pop(unit, None)
        if self._start and self.strength:
            self._mix(params, now, then)
        self._after = {
            "tasks": self._old.get("tasks", 0) + 1,
            "units": self.units,
            "shapes": {**self._old.get("shapes", {}), **{n: list(p.shape) for n, p in params.items()}},
            "importance": {n: v.tolist() for n, v in accumulate(now, then, self.previous_weight).items()},
        }
        self._start, self._kept, self._flat = {}, {}, None

    def _mix(self, params: Mapping[str, nn.Parameter], now: dict[str, Tensor], then: dict[str, Any]) -> None:
        both = [n for n in now if n in then]
        sides = {n: now[n] for n in both}, {n: then[n] for n in both}
        if self.units == "tensor":
            for name, share in present_shares(*sides, self.share, self.previous_weight).items():
                if name in self._start:
                    self._set(name, params[name], share)
            return
        pairs = factor_pairs(params)
        for layer, share_R in present_rank_shares(*sides, self.temperature).items():
            a, b = pairs[layer]
            if a in self._start:
                self._set(a, params[a], share_R[:, None])
                self._set(b, params[b], share_R[None, :])

    def _set(self, name: str, p: nn.Parameter, share: float | Tensor) -> None:
        before = local(sharded_as(self._start[name].to(local(p.detach()).device), p))
        if isinstance(share, Tensor):
            share = share.to(before.device)
            share = local(sharded_as(share, p)) if share.shape[0] == p.shape[0] else share  # FSDP2 shards by rows
        weight = local(p.detach())
        target = mixed(weight, before, share)
        weight.copy_(target if self.strength == 1 else torch.lerp(weight.float(), target.float(), self.strength))

    def _importance(self, run: Run) -> dict[str, Tensor]:
        """One number per tensor, or one per rank, float64 on the CPU; up to a constant factor."""
        assert self._flat is not None
        flat, kept = self._flat, self._kept["uncertainty"]
        for bucket in flat.buckets:
            scores(bucket.of(self._kept["importance"]), bucket.of(kept), out=bucket.of(kept))
        if self.units == "rank":
            parts = flat.named(kept, "")
            return {layer: rank_scores(parts[a], parts[b]) for layer, (a, b) in factor_pairs(flat.params).items()}
        sums = torch.stack([view.double().sum() for _, view in flat.items(kept)])
        sums = sums if self._add_up is None else self._add_up(sums)
        return {n: total / p.numel() for (n, p), total in zip(flat.params.items(), sums.cpu(), strict=True)}

    def task_state(self, run: Run) -> State:
        """Importance to all tasks so far."""
        return self._after

    def state_dict(self, run: Run) -> State:
        """The averages, by parameter name."""
        if self._flat is None:
            return {}
        state: State = {}
        for key, buffer in self._kept.items():
            state |= self._flat.named(buffer, f"{key}/", run.is_main_process)
        return state

    def load_state_dict(self, state: State, run: Run) -> None:
        """Load the averages."""
        self._set_up(run)
        self._resumed = True
        assert self._flat is not None
        for key, buffer in self._kept.items():
            self._flat.fill(buffer, state, f"{key}/")
