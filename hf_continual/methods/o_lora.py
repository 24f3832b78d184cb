r"""O-LoRA: each task learns in directions that no earlier task used.

Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning", EMNLP Findings 2023,
https://arxiv.org/abs/2310.14152.

Each task gets a new adapter; the rows of A span the subspace that it writes from. With A_i of all earlier tasks stacked
to A_old (R_old, D), a new task pays for overlap (eq. 7, as the published code computes it) and, if wished, for length:

    L = L_task + lambda1 sum |A_old A_new^T| + lambda2 sum_P |P|_2      over all layers; P the new factors A and B

The gradients are added in closed form once per optimizer step, after accumulation and clipping:

    d/dA_new = lambda1 sign(A_new A_old^T) A_old + lambda2 A_new / |A_new|_2

`product` is N-LoRA's term (Yang et al., COLING 2025, https://arxiv.org/abs/2410.10179), which makes the updates of the
weights sparse, so that they collide less: lambda3 sum |B A|, with S = sign(B A) the gradients S A^T and B^T S.

Differs from the published code: the terms are added once per optimizer step (theirs once per micro-batch, not divided:
with 8 accumulation steps its lambdas act 8 times). Earlier adapters stay what they are, stacked with the new one or
merged into the base; only their A is needed, and handed over.

Memory: A of every earlier task, R_old D values per layer in float32.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn

from hf_continual.bounds import between
from hf_continual.methods.base import Method, Run, State
from hf_continual.paper import Paper
from hf_continual.tasks import Task
from hf_continual.tensors.whole import whole

__all__ = ["OLoRA", "orthogonality", "orthogonality_gradient"]

logger = logging.getLogger(__name__)

FACTOR = re.compile(r"^(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight$")


def orthogonality(A_old_RD: Tensor, A_new_RD: Tensor) -> Tensor:
    """Overlap of two subspaces, sum |A_old A_new^T| (eq. 7).

    Args:
        A_old_RD: Factors A of all earlier tasks, one below the other, (R_old, D).
        A_new_RD: Factor A of the task, (R_new, D).

    Returns:
        Scalar of at least 0, with its graph.
    """
    return (A_old_RD @ A_new_RD.T).abs().sum()


def orthogonality_gradient(A_old_RD: Tensor, A_new_RD: Tensor) -> Tensor:
    """Gradient of `orthogonality` with respect to the new factor, sign(A_new A_old^T) A_old, (R_new, D)."""
    return torch.sign(A_new_RD @ A_old_RD.T) @ A_old_RD


@dataclass
class OLoRA(Method):
    """Learn each task with a new adapter, in directions orthogonal to those of earlier tasks.

    Idea: an adapter whose A is orthogonal to the earlier ones' does not change what they read.
    Stations: gradients, task end. Cost: two thin products per adapted layer and step.
    Relations: ``weight=0`` is IncLoRA, a new adapter per task and nothing else (``incremental=True`` says so).
    Needs a new adapter in each task: ``between_tasks: new_adapter`` in a plan, ``ContinualTrainer(model=ADAPTER_FOLDER,
    peft_config=...)`` in a script, or a base into which earlier adapters were merged. The saved model is one plain
    adapter. Composes with everything. FSDP: only the orthogonality (`weight`).

    Args:
        weight: lambda1; the paper uses 0.5 for most tasks, 0 to 5 in its long sequences.
        l2: lambda2, of the norms (not squared) of the new factors; the paper uses 0 to 0.3.
        product: lambda3, N-LoRA's L1 norm of the product B A.
        incremental: IncLoRA: no term at all; `weight`, `l2` and `product` must be 0 or left out.
        name: Prefix of the logged values, and of the files that are handed over.

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

    def __post_init__(self) -> None:
        for key in ("weight", "l2", "product"):
            value = getattr(self, key)
            if value is not None and value != 0:
                between("OLoRA", key, value, 0, float("inf"))
        if self.incremental and (self.weight or self.l2 or self.product):
            raise ValueError(
                f"OLoRA(incremental=True) is IncLoRA, which has no term, and weight={self.weight}, l2={self.l2}, "
                f"product={self.product} ask for one. Drop incremental, or the weights."
            )

    @property
    def strength(self) -> float:
        """lambda1 as it is used."""
        return 0.5 if self.weight is None and not self.incremental else float(self.weight or 0.0)

    def prepare_model(self, model: nn.Module, task: Task) -> None:
        """Refuse a model without LoRA."""
        if not isinstance(model, PeftModel) or not any(FACTOR.match(name) for name, _ in model.named_parameters()):
            raise ValueError(
                f"OLoRA works on LoRA adapters, and the model is a {type(model).__name__} without one. Give "
                f"peft_config=LoraConfig(...) (in a plan: peft)."
            )

    def load_task_state(self, state: State, run: Run) -> None:
        """Take over the factors A of the earlier tasks."""
        self._old = {n.removeprefix("A/"): t for n, t in state.items() if n.startswith("A/")}
        params = run.named_parameters()
        for layer, (a, _) in _factors(params).items():
            old = self._old.get(layer)
            if old is None:
                continue
            if old.shape[1:] != params[a].shape[1:]:
                raise ValueError(
                    f"OLoRA: factor A of {layer} has {params[a].shape[1]} columns, that of the earlier tasks "
                    f"{old.shape[1]}: they belong to different models. Start from the model they were trained on, or "
                    f"without what was learned: ContinualConfig(fresh_methods=True)."
                )
            if _is_last(old, whole(params[a].detach())):
                raise ValueError(
                    "OLoRA needs a new adapter for each task, and this run continues that of an earlier task. Give "
                    "between_tasks: new_adapter in a plan, or ContinualTrainer(model=ADAPTER_FOLDER, peft_config=LoraConfig(...))."
                )

    def begin_task(self, run: Run) -> None:
        """Find the pairs of factors, and put the earlier ones where they are."""
        params = run.named_parameters()
        self._pairs = _factors(params)
        if not self._pairs:
            raise ValueError(
                "OLoRA: no LoRA factor is trainable. Load the adapter with is_trainable=True, or freeze less."
            )
        if run.is_sharded and (self.l2 or self.product):
            raise ValueError(
                "OLoRA(l2=..., product=...) needs whole factors, and they are spread over processes. Use weight alone, or DDP."
            )
        self._live = {k: t.to(run.device, torch.float32) for k, t in self._old.items() if k in self._pairs}
        if self._old and len(self._live) < len(self._old):
            logger.warning(
                "OLoRA: %d of %d earlier adapted layers have no adapter in this task; they are handed on as they are.",
                len(self._old) - len(self._live), len(self._old),
            )  # fmt: skip

    @torch.no_grad()
    def edit_gradients(self, params: Mapping[str, nn.Parameter]) -> None:
        """Add the gradients of the terms."""
        for layer, (a_name, b_name) in self._pairs.items():
            a, b = params[a_name], params[b_name]
            if self.strength and layer in self._live:
                _add(a, self.strength * orthogonality_gradient(self._live[layer], _local(a).float()))
            if self.l2:
                for p in (a, b):
                    _add(p, self.l2 * p.float() / p.float().norm().clamp(min=1e-12))
            if self.product:
                signs = torch.sign(b.float() @ a.float())
                grad_a, grad_b = b.float().T @ signs, signs @ a.float().T
                _add(a, self.product * grad_a)
                _add(b, self.product * grad_b)

    def task_state(self, run: Run) -> State:
        """The factors A of all tasks so far, one below the other."""
        params = run.named_parameters()
        new = {layer: whole(params[a].detach()).float().cpu() for layer, (a, _) in self._pairs.items()}
        stacked = dict(self._old)
        for layer, factor in new.items():
            stacked[layer] = torch.cat([self._old[layer].float(), factor]) if layer in self._old else factor
        return {f"A/{layer}": factor.contiguous() for layer, factor in stacked.items()}


def _factors(params: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """Names of the trainable factors A and B by the layer they adapt."""
    found: dict[tuple[str, str | None], dict[str, str]] = {}
    for name in params:
        if match := FACTOR.match(name):
            found.setdefault((match["layer"], match["adapter"]), {})[match["factor"]] = name
    return {layer: (pair["A"], pair["B"]) for (layer, _), pair in found.items() if len(pair) == 2}


def _is_last(old_RD: Tensor, now_RD: Tensor) -> bool:
    """Whether a factor is the one that the last task ended with."""
    rank = now_RD.shape[0]
    return old_RD.shape[0] >= rank and torch.equal(old_RD[-rank:].to(now_RD.dtype), now_RD.cpu())


def _local(p: Tensor) -> Tensor:
    # FSDP2 shards factors by rows, and each row of A_new has a gradient of its own.
    return p.to_local() if hasattr(p, "to_local") else p  # pyrefly: ignore[not-callable]


def _add(p: nn.Parameter, gradient: Tensor) -> None:
    if p.grad is not None:
        _local(p.grad).add_(gradient.to(p.grad.dtype))
