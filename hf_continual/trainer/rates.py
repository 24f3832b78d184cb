"""Learning rates of the live optimizer: the arguments may give a different one, or only one of several."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import CyclicLR, OneCycleLR


def remember_peaks(optimizer: Any) -> None:
    """Record the rate that each group starts with, unless a scheduler has: it is saved and loaded with the group."""
    for group in getattr(optimizer, "param_groups", ()):
        group.setdefault("initial_lr", group["lr"])


def peak_rates(optimizer: Any, scheduler: Any) -> list[float]:
    """The highest rate that the schedule gives each parameter group.

    Args:
        optimizer: The optimizer, without accelerate's wrapper.
        scheduler: Its scheduler, or None.

    Returns:
        One rate per group.
    """
    for part in (scheduler, *getattr(scheduler, "_schedulers", ())):
        if isinstance(part, CyclicLR):
            return [float(rate) for rate in part.max_lrs]
        if isinstance(part, OneCycleLR):
            return [float(group["max_lr"]) for group in optimizer.param_groups]
    return [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]


def main_group(optimizer: Any, peaks: list[float]) -> int | None:
    """The group that represents the run: the first at the optimizer's default rate, else the one with most elements.

    Groups at a rate of zero do not count, since they have no schedule.

    Args:
        optimizer: The optimizer.
        peaks: See `peak_rates`.

    Returns:
        Its index, or None if every rate is zero.
    """
    learning = [i for i, peak in enumerate(peaks) if peak > 0]
    default = getattr(optimizer, "defaults", {}).get("lr")
    for i in learning:
        if default is not None and peaks[i] == float(default):
            return i
    sizes = {i: sum(p.numel() for p in optimizer.param_groups[i]["params"]) for i in learning}
    return max(learning, key=sizes.__getitem__, default=None)


def peak_and_factor(optimizer: Any, scheduler: Any) -> tuple[float, float]:
    """Peak rate of the run's main group, and the schedule's factor now: the group's rate over its peak.

    Args:
        optimizer: The optimizer, without accelerate's wrapper.
        scheduler: Its scheduler, or None.

    Returns:
        Both; (0, 1) if every rate is zero.
    """
    peaks = peak_rates(optimizer, scheduler)
    main = main_group(optimizer, peaks)
    if main is None:
        return 0.0, 1.0
    return peaks[main], float(optimizer.param_groups[main]["lr"]) / peaks[main]
