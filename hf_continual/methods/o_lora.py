r"""O-LoRA: each task learns in directions that no earlier task used.

Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning", EMNLP Findings 2023,
https://arxiv.org/abs/2310.14152.

Each task gets a new adapter; the rows of A span the subspace that it reads. With A_i of all earlier tasks stacked
to A_old (R_old, D), a new task is penalised for overlap (eq. 7, as in the published code) and, optionally, for length:

    L = L_task + lambda1 sum |A_old A_new^T| + lambda2 sum_P |P|_2      over all layers; P the new factors A and B

The gradients are added in closed form once per optimizer step, after accumulation and clipping:

    d/dA_new = lambda1 sign(A_new A_old^T) A_old + lambda2 A_new / |A_new|_2

`product` is N-LoRA's term (Yang et al., COLING 2025, https://arxiv.org/abs/2410.10179), which makes the weight updates
sparse, so that they collide less: lambda3 sum |B A|, with S = sign(B A) the gradients S A^T and B^T S.

Differs from the published code: the terms are added once per optimizer step (theirs once per micro-batch, not divided:
with 8 accumulation steps its lambdas act 8 times). Earlier adapters do not change, whether stacked with the new one or
merged into the base; only their A is needed and handed on.

Memory: A of every earlier task, R_old D values per layer in float32; about 2 bytes per trainable parameter and earlier
task of the same rank, in memory and on disk. `product` temporarily needs a matrix of a layer's size.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn

from hf_continual.bounds import between
from hf_continual.data.kept import FRESH
from hf_continual.methods.base import Method, Run, State
from hf_continual.paper import Paper
from hf_continual.tasks import Task
from hf_continual.tensors.adapters import FACTOR, factor_pairs, fresh_factors
from hf_continual.tensors.flat import local
from hf_continual.tensors.whole import whole

__all__ = ["OLoRA", "orthogonality", "orthogonality_gradient"]

logger = logging.getLogger(__name__)


def orthogonality(A_old_RD: Tensor, A_new_RD: Tensor) -> Tensor:
    """Overlap of two subspaces, sum |A_old A_new^T| (eq. 7).

    Args:
        A_old_RD: Factors A of all earlier tasks, stacked, (R_old, D); or for several layers, (L, R_old, D).
        A_new_RD: Factor A of the task, (R_new, D), or (L, R_new, D).

    Returns:
        Scalar of at least 0, with its graph.
    """
    return (A_old_RD @ A_new_RD.mT).abs().sum()


def orthogonality_gradient(A_old_RD: Tensor, A_new_RD: Tensor) -> Tensor:
    """Gradient of `orthogonality` with respect to the new factor, sign(A_new A_old^T) A_old, in its shape."""
    return torch.sign(A_new_RD @ A_old_RD.mT) @ A_old_RD


@dataclass
class OLoRA(Method):
    """Learn each task with a new adapter, in directions orthogonal to those of earlier tasks.

    Idea: an adapter whose A is orthogonal to the earlier ones' does not change what they read.
    Hooks: gradients, task end. Cost: two thin products per adapted layer and step.
    Relations: ``weight=0`` is IncLoRA, a new adapter per task and nothing else (or ``incremental=True``).
    Needs a new adapter in each task: ``between_tasks: new_adapter`` in a plan, ``ContinualTrainer(model=ADAPTER_FOLDER,
    peft_config=...)`` in a script, or a base into which earlier adapters were merged. The saved model is one plain
    adapter. Composes with everything. FSDP: only the orthogonality (`weight`).

    Args:
        weight: lambda1; the paper uses 0.5 for most tasks, 0 to 5 in its long sequences.
        l2: lambda2, of the norms (not squared) of the new factors; the paper uses 0 to 0.3.
        product: lambda3, N-LoRA's L1 norm of the product B A.
        incremental: IncLoRA: no terms at all; `weight`, `l2` and `product` must be 0 or omitted.
        name: Prefix of the logged values, and of the files handed to the next task.

    Raises:
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If one is out of range, the model has no LoRA adapter, or the adapter is an earlier task's.
    """

    weight: float | None = None
    l2: float = 0.0
    product: float = 0.0
    incremental: bool = False
    name: str = "o_lora"  # pyrefly: ignore[bad-override]

    leaves: ClassVar[str] = "factors A of the adapters of the tasks so far"
    outlives_merging: ClassVar[bool] = True  # used directions stay used
    bytes_per_parameter: ClassVar[float] = 2.0  # for each earlier task: its A, about half of an adapter, in float32
    paper: ClassVar[Paper] = Paper(
        "Orthogonal Subspace Learning for Language Model Continual Learning",
        "Wang et al.",
        2023,
        arxiv="2310.14152",
        venue="EMNLP Findings 2023",
    )
    _old: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _pairs: dict[str, tuple[str, str]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _live: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _stacks: list[tuple[list[str], Tensor]] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for key in ("weight", "l2", "product"):
            value = getattr(self, key)
            if value is not None and value != 0:
                between("OLoRA", key, value, 0, float("inf"))
        if self.incremental and (self.weight or self.l2 or self.product):
            raise ValueError(
                f"OLoRA(incremental=True) is IncLoRA, which has no terms, but weight={self.weight}, l2={self.l2}, "
                f"product={self.product} add some. Drop incremental, or the weights."
            )

    @property
    def strength(self) -> float:
        """The lambda1 in use."""
        return 0.5 if self.weight is None and not self.incremental else float(self.weight or 0.0)

    def prepare_model(self, model: nn.Module, task: Task) -> None:
        """Refuse a model without LoRA."""
        if not isinstance(model, PeftModel) or not any(FACTOR.match(name) for name, _ in model.named_parameters()):
            raise ValueError(
                f"OLoRA works on LoRA adapters, but the model is a {type(model).__name__} without one. Give "
                f"peft_config=LoraConfig(...) (in a plan: peft)."
            )

    def load_task_state(self, state: State, run: Run) -> None:
        """Load the factors A of the earlier tasks."""
        self._old = {n.removeprefix("A/"): t for n, t in state.items() if n.startswith("A/")}
        params = run.named_parameters()
        fresh = fresh_factors(params)
        for layer, (a, _) in factor_pairs(params).items():
            old = self._old.get(layer)
            if old is None:
                continue
            if old.shape[1:] != params[a].shape[1:]:
                raise ValueError(
                    f"OLoRA: factor A of {layer} has {params[a].shape[1]} columns, that of the earlier tasks "
                    f"{old.shape[1]}: they belong to different models. Start from the model they were trained on, or "
                    f"without what was learned: {FRESH}."
                )
            if a not in fresh and _is_last(old, whole(params[a].detach())):
                raise ValueError(
                    "OLoRA needs a new adapter for each task, but this run continues an earlier task's. Give "
                    "between_tasks: new_adapter in a plan, or ContinualTrainer(model=ADAPTER_FOLDER, peft_config=LoraConfig(...))."
                )

    def begin_task(self, run: Run) -> None:
        """Find the pairs of factors, and move the earlier ones to their device."""
        params = run.named_parameters()
        self._pairs = factor_pairs(params)
        if not self._pairs:
            raise ValueError(
                "OLoRA: no LoRA factor is trainable. Load the adapter with is_trainable=True, or freeze less."
            )
        if run.is_sharded and (self.l2 or self.product):
            raise ValueError(
                "OLoRA(l2=..., product=...) needs whole factors, and they are sharded over processes. Use only weight, or DDP."
            )
        self._stacks = None
        self._live = {k: t.to(run.device, torch.float32) for k, t in self._old.items() if k in self._pairs}
        if self._old and len(self._live) < len(self._old):
            logger.warning(
                "OLoRA: %d of %d earlier adapted layers have no adapter in this task; they are handed on unchanged.",
                len(self._old) - len(self._live), len(self._old),
            )  # fmt: skip

    @torch.no_grad()
    def edit_gradients(self, params: Mapping[str, nn.Parameter]) -> None:
        """Add the gradients of the terms."""
        if self.strength:
            for layers, old_LRD in self._stacked(params):
                factors = [params[self._pairs[layer][0]] for layer in layers]
                new_LRD = torch.stack([local(p.detach()).float() for p in factors])
                _add(factors, orthogonality_gradient(old_LRD, new_LRD).mul_(self.strength).unbind())
        if self.l2:
            both = [params[name] for pair in self._pairs.values() for name in pair]
            values = [p.detach().float() for p in both]
            lengths = torch._foreach_norm(values)
            torch._foreach_clamp_min_(lengths, 1e-12)
            _add(both, torch._foreach_mul(torch._foreach_div(values, lengths), self.l2))
        if self.product:
            for pair in self._pairs.values():
                a, b = (params[name].detach().float() for name in pair)
                signs = torch.sign(b @ a)
                _add([params[name] for name in pair], [self.product * (b.T @ signs), self.product * (signs @ a.T)])

    def _stacked(self, params: Mapping[str, nn.Parameter]) -> list[tuple[list[str], Tensor]]:
        """Layers of one shape with their earlier factors (L, R_old, D): one kernel for all instead of one each."""
        if self._stacks is None:
            alike: dict[tuple[torch.Size, torch.Size], list[str]] = {}
            for layer, old_RD in self._live.items():
                shapes = old_RD.shape, local(params[self._pairs[layer][0]].detach()).shape
                alike.setdefault(shapes, []).append(layer)
            self._stacks = [(layers, torch.stack([self._live[n] for n in layers])) for layers in alike.values()]
            for layers, stack in self._stacks:
                views = dict(zip(layers, stack, strict=True))  # views, so nothing is stored twice
                self._live.update(views)
                self._old.update(views)
        return self._stacks

    def task_state(self, run: Run) -> State:
        """The factors A of all tasks so far, stacked."""
        params = run.named_parameters()
        new = {layer: whole(params[a].detach()).float().cpu() for layer, (a, _) in self._pairs.items()}
        stacked = dict(self._old)
        for layer, factor in new.items():
            stacked[layer] = torch.cat([stacked[layer].cpu().float(), factor]) if layer in stacked else factor
        return {f"A/{layer}": factor.cpu().contiguous() for layer, factor in stacked.items()}


def _is_last(old_RD: Tensor, now_RD: Tensor) -> bool:
    """Whether a factor equals the one that the last task ended with."""
    rank = now_RD.shape[0]
    return old_RD.shape[0] >= rank and torch.equal(old_RD[-rank:].to(now_RD.dtype), now_RD.cpu())


def _add(factors: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    """Add to the existing gradients; FSDP2 shards factors by rows, and each row has its own gradient."""
    held = [(local(p.grad), g) for p, g in zip(factors, gradients, strict=True) if p.grad is not None]
    if held:
        torch._foreach_add_([to for to, _ in held], [g.to(to.dtype) for to, g in held])
