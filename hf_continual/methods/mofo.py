r"""MoFO: AdamW that moves only the entries of each weight with the largest momentum.

Chen et al., "MoFO: Momentum-Filtered Optimizer for Mitigating Forgetting in LLM Fine-Tuning", TMLR 2025,
https://arxiv.org/abs/2407.20999.

Both moments are AdamW's, updated for every entry. Of each weight only the fraction `share` with the largest |m| then moves;
with n entries and k = floor(share n), at least 1:

    keep_i = |m_i| >= the k-th largest |m| of the tensor and m_i != 0
    theta_i <- AdamW(theta_i) if keep_i else theta_i

Every weight stays closer to where it started, at nearly the same loss. No old rows are needed.

Ties: entries equal to the k-th largest all move, as in the published code, so that a few more than k may. Entries whose momentum
is exactly zero, such as rows of embeddings that no token has used, never count as tied and do not move.
One-dimensional parameters (norms, biases) move in full, as in the published code.

Differs from the published code: weight decay is filtered too, so that an entry that is not kept does not change in a single bit
(theirs decays every entry); moments have the dtype that AdamW gives them, that of the parameter (theirs float32).

The k-th largest is found by counting, not by sorting: on a CPU in two histograms of the float's bits, on a device by bisection
over its 31 bits with one comparison and count for all tensors of one shape, without waiting for the device. Weights sharded over
processes (FSDP2) add their counts.

Memory: AdamW's state and nothing else; during a step the weights of one batch of tensors, at most 2^25 entries or one
tensor, and their magnitudes. Cost: per entry one histogram pass on a CPU (a selection takes about five times AdamW's kernel), 31
passes over the momentum on a device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.adamw import adamw

from hf_continual.bounds import between
from hf_continual.methods.base import Method, OptimizerChoice, Run
from hf_continual.paper import Paper
from hf_continual.tensors.flat import local
from hf_continual.tensors.selection import kth_largest

__all__ = ["MoFO", "MoFOOptimizer", "kept_entries"]

logger = logging.getLogger(__name__)

# Entries that are copied and selected from in one go: bounds the copies, which on a CPU stay in the cache.
CPU_BATCH, DEVICE_BATCH = 1 << 18, 1 << 25


def kept_entries(
    momenta: list[Tensor], share: float, count: int | None = None, add_up: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    """Select the entries of each tensor that may move.

    Args:
        momenta: m of tensors of one shape; with several processes, this one's shards.
        share: Fraction that moves, in (0, 1].
        count: Number of entries of each whole tensor, if they are sharded.
        add_up: Sums counts over the processes, if they are sharded.

    Returns:
        bool of the same shapes, True for the k largest magnitudes, for those equal to the smallest of these, and for NaN; False
        where the momentum is zero.

    Raises:
        ValueError: If the fraction is out of range.
    """
    between("kept_entries", "share", share, 0, 1, "]", "It is the fraction of entries that moves.")
    sizes_LN = torch.stack([m.reshape(-1) for m in momenta]).float().abs_()
    k = max(1, int(share * (count or sizes_LN.shape[1]) * (1 + 1e-12)))  # 0.3 * 10 is 3, however it is rounded
    threshold_L = kth_largest(sizes_LN, k, add_up)
    # Written as "not below", so that a NaN moves its weight and shows, as with AdamW.
    keep_LN = (sizes_LN < threshold_L[:, None]).logical_not_().logical_and_(sizes_LN != 0)
    return [keep.view(m.shape) for keep, m in zip(keep_LN, momenta, strict=True)]


class MoFOOptimizer(AdamW):
    """torch's fused AdamW, after which all entries but those with the largest momentum are put back.

    Args:
        params: Parameters or groups; a group may have its own `share`.
        share: Fraction of the entries of each tensor that moves, in (0, 1]; 1 is `torch.optim.AdamW(fused=True)`.
        **options: `lr`, `betas`, `eps` and `weight_decay` of AdamW.
    """

    def __init__(self, params: Iterable[Any], share: float = 0.15, **options: Any) -> None:
        super().__init__(params, **options, fused=True)
        self._step_supports_amp_scaling = False  # a scaler must unscale gradients, or skip the step, before it
        self.defaults["share"] = share
        for group in self.param_groups:
            group.setdefault("share", share)
            between("MoFO", "share", group["share"], 0, 1, "]", "It is the fraction of entries that moves.")
        self.add_up: Callable[[Tensor], Tensor] | None = None  # sums over processes, set where weights are sharded

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyrefly: ignore[bad-override]
        """Update all parameters that have a gradient.

        Args:
            closure: Computes the loss again and its gradients.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            filtered = [p for p in held if p.dim() > 1 and group["share"] < 1]
            self._adamw([p for p in held if p.dim() <= 1 or group["share"] == 1], group)
            for members in _batches(filtered):
                before = [local(p.detach()).clone() for p in members]
                self._adamw(members, group)
                moments = [local(self.state[p]["exp_avg"]) for p in members]
                keep = kept_entries(moments, group["share"], members[0].numel(), self.add_up)
                for p, old, kept in zip(members, before, keep, strict=True):
                    weight = local(p.detach())
                    weight.copy_(torch.where(kept, weight, old))
        return loss

    def _adamw(self, members: list[Tensor], group: dict[str, Any]) -> None:
        """The step of `torch.optim.AdamW(fused=True)` for some parameters, with its state."""
        for p in members:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
                }
        states = [self.state[p] for p in members]
        beta1, beta2 = group["betas"]
        adamw(
            [local(p.detach()) for p in members],
            [local(p.grad) for p in members if p.grad is not None],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [], [local(state["step"]) for state in states],
            fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=False,
        )  # fmt: skip


def _batches(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one shape, dtype and device, as many as may be copied at once; the same on every process."""
    alike: dict[tuple[Any, ...], list[Tensor]] = {}
    for p in params:
        alike.setdefault((p.shape, p.dtype, p.device), []).append(p)
    for members in alike.values():
        most = CPU_BATCH if members[0].device.type == "cpu" else DEVICE_BATCH
        size = max(1, most // max(1, members[0].numel()))
        for i in range(0, len(members), size):
            yield members[i : i + size]


@dataclass
class MoFO(Method):
    """AdamW that moves only the entries of each weight with the largest momentum.

    Idea: a task can be learned by moving few entries per step, and weights that stay near the pretrained ones forget less.
    Hooks: optimizer. Cost: a copy and a selection per step, see the module's docstring; no old rows, no further state.
    Relations: ``share=1`` is torch's fused AdamW, bit for bit. MIGU chooses output neurons by activation and edits gradients, so
    that momentum still moves the others; here nothing else moves. Composes with everything except another optimizer.

    Args:
        share: Fraction of the entries of each tensor that moves in a step; the paper uses 0.05 to 0.2. Small fractions learn more
            slowly per step and may need a larger learning rate.

    Raises:
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If one is out of range, or no trained parameter has two dimensions.
    """

    share: float = 0.15

    name: ClassVar[str] = "mofo"
    paper: ClassVar[Paper] = Paper(
        "MoFO: Momentum-Filtered Optimizer for Mitigating Forgetting in LLM Fine-Tuning",
        "Chen et al.",
        2025,
        arxiv="2407.20999",
        venue="TMLR 2025",
    )

    def __post_init__(self) -> None:
        between("MoFO", "share", self.share, 0, 1, "]", "It is the fraction of each weight's entries that moves.")

    def optimizer(self, run: Run) -> OptimizerChoice:
        """AdamW's betas, epsilon and weight decay are those of the training arguments."""
        defaults = run.optimizer_defaults()
        return OptimizerChoice(
            MoFOOptimizer, {**{key: defaults[key] for key in ("lr", "betas", "eps")}, "share": self.share}
        )

    def begin_task(self, run: Run) -> None:
        """Check that there is something to select from, and connect the processes if weights are sharded."""
        params = run.named_parameters()
        matrices = [p for p in params.values() if p.dim() > 1]
        if not matrices and self.share < 1:
            raise ValueError(
                f"MoFO(share={self.share:g}): all {len(params)} trained parameters are vectors (norms, biases), which always "
                f"move in full, so it would be plain AdamW. Train a weight of a linear layer or an adapter, or drop MoFO."
            )
        if not isinstance(run.optimizer, MoFOOptimizer):
            raise TypeError(f"MoFO needs its own optimizer, and the run has a {type(run.optimizer).__name__}.")
        run.optimizer.add_up = run.sum if run.is_sharded else None
        logger.info(
            "mofo: %g of the entries of %d tensors move in each step; %d vectors move in full.",
            self.share, len(matrices), len(params) - len(matrices),
        )  # fmt: skip
