r"""The optimizer of RecAdam: Adam with steps that also go a fraction of the way back to anchors.

Chen et al., EMNLP 2020, https://arxiv.org/abs/2004.12651; the mathematics are in `hf_continual.methods.recadam`.

One fused AdamW kernel does the Adam part: RecAdam's eps is outside the bias correction, which is AdamW with
``eps / sqrt(1 - b2^t)``; the recall is one interpolation of lists of tensors on top of it.

For a weight in bf16 or fp16 the optimizer keeps the rounding error, see `hf_continual.tensors.residuals`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from hf_continual.methods.recadam.recall import recall_
from hf_continual.methods.recadam.schedule import Anneal, check_options, owed_share, recall_schedule, recall_share
from hf_continual.tensors.flat import local
from hf_continual.tensors.residuals import round_, stamp, to_exact_

__all__ = ["Anneal", "RecAdamOptimizer", "check_options", "recall_schedule", "recall_share"]

CPU_BATCH = 1 << 20  # parameters updated in one call on a CPU: part of them is still in the cache for the recall
LOW_BATCH = 1 << 25  # parameters in low precision updated in one call on a device: bounds the fp32 copies
KEPT_TYPES = ("exp_avg", "exp_avg_sq", "residual", "owed", "fisher")  # state whose dtype is not the parameter's


class RecAdamOptimizer(Optimizer):
    """Adam with an annealed pull to anchors; see the module's docstring for the update.

    Every option can be set per parameter group. A group may carry ``"anchors"``, tensors parallel to
    ``"params"``; without them a parameter's anchor is its value when its state is created, at the first step.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment, outside the bias correction.
        weight_decay: Decoupled decay, applied last.
        correct_bias: Whether the moments' bias is corrected.
        anneal: Schedule of the task's weight; ``"none"`` pulls with r = lr * anchor_strength at every step.
        k: Steepness of the sigmoid, per update.
        t0: Update at which the sigmoid is at half, or the linear schedule at its end.
        anneal_w: Sum of both weights; 0 makes a group plain Adam.
        anchor_strength: gamma.
        floor: Minimum weight of the recall, which keeps a pull after t0; 0 is the paper.
        out_of_range: What to do with r outside [0, 1]: ``"error"`` or ``"clamp"``.
        pull_every: Updates between two pulls, which then go the compounded fraction 1 - prod(1 - r) at once.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        anneal: Anneal = "sigmoid",
        k: float = 0.5,
        t0: float = 250,
        anneal_w: float = 1.0,
        anchor_strength: float = 5000.0,
        floor: float = 0.0,
        out_of_range: Literal["error", "clamp"] = "error",
        pull_every: int = 1,
    ) -> None:
        self._written: dict[Tensor, tuple[int, int, int]] = {}
        self.store_anchors = True  # whether state_dict holds them; False if they can be read again by name
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias,
            "anneal": anneal, "k": k, "t0": t0, "anneal_w": anneal_w, "anchor_strength": anchor_strength,
            "floor": floor, "out_of_range": out_of_range, "pull_every": pull_every,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking its options."""
        super().add_param_group(param_group)
        check_options(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyrefly: ignore[bad-override]
        """Update all parameters that have a gradient.

        Args:
            closure: Computes the loss again and its gradients.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: If r lies outside [0, 1], before any parameter is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates = []
        for group in self.param_groups:
            for (t, owed, *_), members in self._alike(group).items():
                weight, share = self._checked_share(group, t)
                owed = owed_share(owed, share)
                due = t % group["pull_every"] == 0
                updates.append((group, t, weight, owed if due else 0.0, 0.0 if due else owed, members))
        for group, t, weight, share, owed, members in updates:
            for p in members:
                self.state[p]["step"] += 1
                if group["pull_every"] > 1:
                    self.state[p]["owed"] = torch.tensor(owed)
            self._update(group, t, weight, share, members)
        return loss

    def _alike(self, group: dict[str, Any]) -> dict[tuple[Any, ...], list[Tensor]]:
        """Parameters with a gradient, by update, owed fraction, device and dtype."""
        buckets: dict[tuple[Any, ...], list[Tensor]] = {}
        for i, p in enumerate(group["params"]):
            if p.grad is not None:
                state = self._state_of(p, i, group)
                t = int(state["step"]) + 1  # on the host: no wait for the device
                owed = float(state.get("owed", 0.0)) if group["pull_every"] > 1 else 0.0
                buckets.setdefault((t, owed, p.device, p.dtype, "fisher" in state), []).append(p)
        return buckets

    def _state_of(self, p: Tensor, index: int, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[p]
        if "anchor" not in state:
            if "exp_avg" in state:
                raise RuntimeError(
                    "RecAdam's anchors are not in the loaded optimizer state: it was saved while they could be read from "
                    "the base checkpoint. Load it through ContinualTrainer, or set optimizer.state[p]['anchor']."
                )
            given = group["anchors"][index].to(p) if "anchors" in group else p.detach()
            if isinstance(p, DTensor) and not isinstance(given, DTensor):
                given = distribute_tensor(given, p.device_mesh, p.placements)
            state["anchor"] = given.clone() if isinstance(given, DTensor) else given.contiguous().clone()
        if "exp_avg" not in state:
            low = p.dtype in (torch.bfloat16, torch.float16)
            state["step"] = torch.zeros(())
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(state["anchor"], dtype=torch.float32 if low else p.dtype)
            if low:
                state["residual"] = torch.zeros_like(state["anchor"], dtype=torch.float32)
        for key in ("step", "owed"):  # a sharded checkpoint loads them on the device
            if key in state and state[key].device.type != "cpu":
                state[key] = state[key].cpu()
        return state

    def _checked_share(self, group: dict[str, Any], t: int) -> tuple[float, float]:
        weight, share = recall_share(group, t)
        if 0 <= share <= 1:
            return weight, share
        if group["out_of_range"] == "clamp":
            return weight, min(max(share, 0.0), 1.0)
        lr, gamma = float(group["lr"]), group["anchor_strength"]
        raise ValueError(
            f"RecAdam: at update {t} the pull r = lr * (w - lambda) * anchor_strength = {lr:g} * {share / (lr * gamma):g} * "
            f"{gamma:g} = {share:g} lies outside [0, 1] and would overshoot the anchor. Use anchor_strength below "
            f"{gamma / share:g}, give the pull itself (pull=0.05), or out_of_range='clamp'."
        )

    def _update(self, group: dict[str, Any], t: int, weight: float, share: float, members: list[Tensor]) -> None:
        (beta1, beta2), lr = group["betas"], float(group["lr"])
        root = math.sqrt(1 - beta2**t)
        # Adam in its usual form has eps inside the bias correction; RecAdam's is outside, which equals this eps and
        # rate.
        adam = {
            "lr": lr * weight * (1.0 if group["correct_bias"] else (1 - beta1**t) / root),
            "beta1": beta1, "beta2": beta2, "weight_decay": 0.0, "eps": group["eps"] / root,
            "amsgrad": False, "maximize": False,
        }  # fmt: skip
        decay = 1 - lr * group["weight_decay"]
        low = "residual" in self.state[members[0]]
        count = torch.full((), float(t), device=members[0].device)
        for p in members if low else ():
            self.residual(p)
        weighed = "fisher" in self.state[members[0]]
        for p, g, m, v, anchor, residual, fisher in self._batches(members, low):
            work = to_exact_(p, residual) if low else p
            torch._fused_adamw_(work, [x.float() for x in g] if low else g, m, v, [], [count] * len(p), **adam)
            if share:
                recall_(work, [x.float() for x in anchor] if low else anchor, share, fisher if weighed else None)
            if decay != 1:
                torch._foreach_mul_(work, decay)
            if low:
                round_(p, work)
        if low or group["pull_every"] > 1:
            for p in members:
                self.settle(p)

    def residual(self, p: Tensor) -> Tensor | None:
        """See `KeepsResiduals`."""
        if "residual" not in self.state.get(p, {}):
            return None
        residual = local(self.state[p]["residual"])
        if self._edited(p):
            residual.zero_()
            self.settle(p)
        return residual

    def settle(self, p: Tensor) -> None:
        """See `KeepsResiduals`."""
        self._written[p] = stamp(p)

    def _edited(self, p: Tensor) -> bool:
        return p in self._written and self._written[p] != stamp(p)

    @torch.no_grad()
    def apply_owed_pulls(self) -> None:
        """Apply the pull deferred by `pull_every`, except to weights loaded or edited since the last update."""
        for p, state in self.state.items():
            share = float(state.get("owed", 0.0))
            if not share or self._edited(p):
                continue
            weight, anchor = local(p.detach()), local(state["anchor"])
            residual = self.residual(p)
            if residual is None:
                weight.lerp_(anchor, share)
            else:
                round_([weight], [to_exact_([weight], [residual])[0].lerp_(anchor.float(), share)])
            state["owed"] = torch.zeros(())
            self.settle(p)

    def _batches(self, members: list[Tensor], low: bool) -> Iterable[tuple[list[Tensor], ...]]:
        """Local tensors to update in one call: all at once on a device, a few that fit in the cache on a CPU."""
        copies = low or "fisher" in self.state[members[0]]
        most = CPU_BATCH if members[0].device.type == "cpu" else (LOW_BATCH if copies else math.inf)
        pending: list[list[Tensor]] = []
        size = 0
        for p in members:
            state, grad = self.state[p], p.grad
            assert grad is not None
            row = [p.detach(), grad, state["exp_avg"], state["exp_avg_sq"], state["anchor"]]
            row += [state["residual"] if low else row[-1], state.get("fisher", row[-1])]
            if isinstance(p, DTensor):
                row = [x.to_local() for x in row]  # pyrefly: ignore[missing-attribute]
            if not row[0].numel():
                continue
            if row[1].dtype != row[0].dtype or not row[1].is_contiguous():
                row[1] = row[1].to(row[0].dtype).contiguous()
            if row[0].is_contiguous():
                pending.append(row)
                size += row[0].numel()
            else:  # the kernels walk through memory, so a transposed parameter is updated in a copy
                original, row[0] = row[0], row[0].contiguous()
                yield tuple([x] for x in row)
                original.copy_(row[0])
            if size >= most:
                yield tuple(list(column) for column in zip(*pending, strict=True))
                pending, size = [], 0
        if pending:
            yield tuple(list(column) for column in zip(*pending, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """As for every optimizer; without the anchors if `store_anchors` is off."""
        for p in self.state:
            self.residual(p)
        saved = super().state_dict()
        saved["param_groups"] = [{k: v for k, v in g.items() if k != "anchors"} for g in saved["param_groups"]]
        if not self.store_anchors:
            saved["state"] = {
                i: {k: v for k, v in state.items() if k != "anchor"} for i, state in saved["state"].items()
            }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As for every optimizer; fp32 state stays in fp32, and anchors missing from it are kept."""
        anchors = [group.get("anchors") for group in self.param_groups]
        held = {p: state["anchor"] for p, state in self.state.items() if "anchor" in state}
        super().load_state_dict(state_dict)
        order = [p for group in self.param_groups for p in group["params"]]
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for p, i in zip(order, saved, strict=True):
            state = self.state.get(p)
            if state is None:
                continue
            for key in KEPT_TYPES:  # torch casts state to the parameter's dtype
                if key in state and state[key].dtype != state_dict["state"][i][key].dtype:
                    state[key] = state_dict["state"][i][key].to(p.device).clone()
            if "residual" in state:
                state["residual"] = state["residual"].float()
            if "anchor" not in state and p in held:
                state["anchor"] = held[p]
        for group, given in zip(self.param_groups, anchors, strict=True):
            if given is not None:
                group["anchors"] = given

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore loaded or copied state; the weights are used as they are."""
        super().__setstate__(state)
        self._written = {}
        self.__dict__.setdefault("store_anchors", True)
        for group in self.param_groups:
            group.setdefault("pull_every", 1)  # for states saved before this option existed
