"""RecAdam's weights of task and anchor at an update, and checks of its options.

Chen et al., EMNLP 2020, https://arxiv.org/abs/2004.12651; the mathematics are in `hf_continual.methods.recadam`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from hf_continual.bounds import at_least, between, one_of, whole_number

Anneal = Literal["sigmoid", "linear", "constant", "none"]
ANNEALS = ("sigmoid", "linear", "constant", "none")


def recall_schedule(anneal: Anneal, t: int, k: float, t0: float, w: float) -> float:
    """Weight of the task's loss at an update, lambda(t).

    Args:
        anneal: Shape of the schedule.
        t: Update of the parameter, counted from 1.
        k: Steepness of the sigmoid.
        t0: Update at which the sigmoid is at half, or at which the linear schedule ends.
        w: Sum of the two weights.

    Returns:
        lambda, between 0 and w.
    """
    if anneal == "sigmoid":
        exponent = -k * (t - t0)
        return w / (1 + math.exp(exponent)) if exponent < 700 else 0.0  # exp overflows at 710
    if anneal == "linear":
        return w * min(1.0, t / t0)
    return w if anneal == "constant" else 1.0


def recall_share(group: dict[str, Any], t: int) -> tuple[float, float]:
    """An update's weights of the task and of the anchor.

    Args:
        group: Options of a parameter group.
        t: Update of the parameter, counted from 1.

    Returns:
        lambda, the factor of the Adam step, and r, the fraction of the way back to the anchor.
    """
    w, lr = group["anneal_w"], float(group["lr"])
    if w <= 0:
        return 1.0, 0.0
    weight = recall_schedule(group["anneal"], t, group["k"], group["t0"], w)
    recall = 1.0 if group["anneal"] == "none" else max(w - weight, group["floor"])
    return weight, lr * recall * group["anchor_strength"]


def owed_share(owed: float, share: float) -> float:
    """The fraction of the way to a fixed point after both: 1 - (1 - owed) (1 - share); `share` itself after 0."""
    return owed + share - owed * share


def check_options(options: dict[str, Any]) -> None:
    """Refuse invalid options of a parameter group."""
    if options["lr"] < 0:  # a number or a tensor
        raise ValueError(f"RecAdam: lr={options['lr']!r} must be 0 or more.")
    one_of("RecAdam", "anneal", options["anneal"], ANNEALS)
    if options["anneal"] == "linear" and options["t0"] <= 0:
        raise ValueError(f"RecAdam: anneal='linear' ends at t0, so t0={options['t0']!r} must be above 0.")
    for name in ("eps", "weight_decay", "anneal_w", "anchor_strength", "floor"):
        at_least("RecAdam", name, options[name], 0)
    for beta in options["betas"]:
        between("RecAdam", "betas", beta, 0, 1, "[")
    whole_number("RecAdam", "pull_every", options["pull_every"], unit="updates")
    one_of("RecAdam", "out_of_range", options["out_of_range"], ("error", "clamp"))
    if "anchors" in options and len(options["anchors"]) != len(options["params"]):
        raise ValueError(
            f"RecAdam: a group has {len(options['params'])} params and {len(options['anchors'])} anchors; the lists are "
            f"parallel and must have equal length."
        )
