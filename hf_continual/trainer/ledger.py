"""Means for the log that stay on the device until they are logged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from accelerate import Accelerator
    from torch import Tensor

    from hf_continual.methods.base import Method, Run


class Ledger:
    """Sums and counts by name; one reduction and one transfer per log, none per step."""

    def __init__(self) -> None:
        self.entries: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Add a sum over `count` items; the logged value is the total divided by the count."""
        device = next((x.device for x in (total, count) if isinstance(x, torch.Tensor)), None)
        # Plain numbers become tensors directly on the device; copying them would cost a transfer per call.
        pair = [
            x.detach().float() if isinstance(x, torch.Tensor) else torch.full((), float(x), device=device)
            for x in (total, count)
        ]
        entry = torch.stack(pair)
        self.entries[name] = self.entries[name] + entry if name in self.entries else entry

    def add_logged(self, methods: Iterable[Method], run: Run) -> None:
        """Add what methods say of themselves in a log that is written now, see `Method.logged`."""
        for method in methods:
            for name, value in method.logged(run).items():
                self.add(f"{method.name}/{name}", value)

    def flush(self, accelerator: Accelerator) -> dict[str, float]:
        """Means since the last flush, over all processes; all processes must call this together."""
        if not self.entries:
            return {}
        names = list(self.entries)
        sums = torch.stack([self.entries[name].to(accelerator.device) for name in names])
        sums = accelerator.reduce(sums, reduction="sum").tolist()
        self.entries.clear()
        return {name: total / count for name, (total, count) in zip(names, sums, strict=True) if count}
