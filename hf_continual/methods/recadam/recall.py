"""The pull of RecAdam towards its anchors: one fraction for all weights, or one per weight from its Fisher information.

With F the diagonal Fisher information over its mean, the quadratic term of the paper (eq. 6) is gamma / 2 sum_i F_i (theta_i -
theta*_i)^2, which its optimizer simplifies to F_i = 1. Decoupled in the same way, a weight goes min(1, r F_i) of the
way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_continual.tensors.flat import local
from hf_continual.tensors.whole import sharded_as

SAVED = ".safetensors"


@torch.no_grad()
def recall_(work: Sequence[Tensor], anchors: Sequence[Tensor], share: float, fisher: Sequence[Tensor] | None) -> None:
    """Go a fraction of the way to the anchors, in place.

    Args:
        work: Weights.
        anchors: theta*, of the same dtype.
        share: r, in [0, 1].
        fisher: F over its mean, float32; None if all weights go the same fraction.
    """
    if fisher is None:
        torch._foreach_lerp_(list(work), list(anchors), share)
        return
    shares = torch._foreach_mul([f.to(w.dtype) for f, w in zip(fisher, work, strict=True)], share)
    torch._foreach_clamp_max_(shares, 1.0)
    torch._foreach_lerp_(list(work), list(anchors), shares)


def over_mean(fisher: Mapping[str, Tensor], add_up: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """F divided by its mean over all weights, so that the scalar form is F = 1; float32.

    Args:
        fisher: F by name, at least 0; its shards if weights are sharded over processes.
        add_up: Sums over the processes if they are, else None.

    Returns:
        New tensors of the same shapes; exactly 1 if F is constant.

    Raises:
        ValueError: If F is not finite, or zero everywhere.
    """
    parts = [local(f) for f in fisher.values()]
    # float64 adds up equal numbers of 24 bits without rounding, up to 2^29 of them.
    total = torch.stack([p.double().sum() for p in parts]).sum()
    count = torch.tensor(float(sum(p.numel() for p in parts)), dtype=torch.float64, device=total.device)
    if add_up is not None:
        total, count = add_up(torch.stack([total, count]))
    mean = float(total / count)
    if not 0 < mean < float("inf"):
        raise ValueError(
            f"RecAdam(fisher=...): the mean of the Fisher information is {mean:g}, so it cannot rank weights. Give "
            f"rows whose loss depends on the trained weights."
        )
    return {name: (f.double() / mean).float() for name, f in fisher.items()}


def read_fisher(file: str, params: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Read F as EWC left it (``continual/ewc.safetensors`` in a model's folder), sharded like the weights.

    Args:
        file: The file.
        params: Weights by name.
        device: Their device.

    Returns:
        F by name, float32.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or lacks a weight or has it in another shape.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(
            f"RecAdam(fisher={file!r}): there is no such file. EWC leaves one as continual/ewc.safetensors in the model folder of "
            f"a task; or give rows, and F is measured on them."
        )
    found: dict[str, Any] = {}
    try:
        with safe_open(file, "pt") as opened:
            known = {key.removeprefix("fisher/"): key for key in opened.keys() if key.startswith("fisher/")}
            found = {name: opened.get_tensor(known[name]) for name in params if name in known}
    except SafetensorError as error:
        raise ValueError(f"RecAdam(fisher={file!r}) cannot be read ({error}). Give the file as EWC left it.") from error
    wrong = [n for n, p in params.items() if n not in found or found[n].shape != p.shape]
    if wrong:
        then = tuple(found[wrong[0]].shape) if wrong[0] in found else "nothing"
        raise ValueError(
            f"RecAdam(fisher={file!r}) does not belong to this model: {len(wrong)} weights differ, such as {wrong[0]}: {then} "
            f"there, {tuple(params[wrong[0]].shape)} here. Give the file of the model that training starts from, or rows."
        )
    return {n: sharded_as(t.to(device, torch.float32), params[n]) for n, t in found.items()}
