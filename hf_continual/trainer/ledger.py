"""Logged means that stay on the device until they are logged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor


class Ledger:
    """Sums and counts by name; one reduction and one transfer per log, none per step."""

    def __init__(self) -> None:
        self.entries: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Enter a sum over `count` items; what is logged is the total over the count."""
        device = next((x.device for x in (total, count) if isinstance(x, torch.Tensor)), None)
        # Plain numbers become tensors on the device itself; copying them there would cost a transfer per call.
        pair = [
            x.detach().float() if isinstance(x, torch.Tensor) else torch.full((), float(x), device=device)
            for x in (total, count)
        ]
        entry = torch.stack(pair)
        self.entries[name] = self.entries[name] + entry if name in self.entries else entry

    def flush(self, accelerator: Accelerator) -> dict[str, float]:
        """Means since the last flush over all processes; every process must call it together."""
        if not self.entries:
            return {}
        names = list(self.entries)
        sums = torch.stack([self.entries[name].to(accelerator.device) for name in names])
        sums = accelerator.reduce(sums, reduction="sum").tolist()
        self.entries.clear()
        return {name: total / count for name, (total, count) in zip(names, sums, strict=True) if count}
