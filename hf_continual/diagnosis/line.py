"""The held rows along the straight line of weights from BEFORE to AFTER.

Where the loss has no hump between the two, they lie in one valley, and a model between them may keep the old rows at little
cost to the new ones (linear mode connectivity, Frankle et al. 2020, arXiv 1912.05671; WiSE-FT, arXiv 2109.01903).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hf_continual.diagnosis.models import Patients, in_memory
from hf_continual.diagnosis.updates import effective

POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)


def along_the_line(
    patients: Patients, score: Callable[[Any], Any], points: Sequence[float] = POINTS, device: str | None = None
) -> list[Any]:
    """Score models between the two.

    Holds one model; the weights of both are read a tensor at a time for every point.

    Args:
        patients: The checkpoints.
        score: Called with the model.
        points: Shares of the way to AFTER.
        device: Where.

    Returns:
        What `score` returned at each point; empty where the two are not of one shape, or their tensors are named otherwise on
        the disk than in memory.
    """
    whole = type(patients.before)(patients.before.checkpoint)
    found = []
    with in_memory(whole, device) as model:
        params = {name: p for name, p in model.named_parameters()}
        names = [n for n in patients.before.names if n in params]
        if len(names) < len(params) or any(_differs(patients, n) for n in names):
            return []
        for point in points:
            with torch.no_grad():
                for name in names:
                    first, last = effective(patients.before, name), effective(patients.after, name)
                    assert first is not None and last is not None
                    params[name].copy_(torch.lerp(first, last, point))
            found.append(score(model))
    return found


def _differs(patients: Patients, name: str) -> bool:
    first, last = patients.before.view(name), patients.after.view(name)
    return first is None or last is None or first.source.shape != last.source.shape


def hump(losses: Sequence[float], points: Sequence[float] = POINTS) -> float:
    """How far the loss rises above the straight line between its ends: the barrier, at least 0.

    Args:
        losses: Loss at each point.
        points: The points, from 0 to 1.

    Returns:
        The barrier, in the unit of the loss.
    """
    straight = [losses[0] + p * (losses[-1] - losses[0]) for p in points]
    return max(0.0, *(loss - level for loss, level in zip(losses, straight, strict=True)))
