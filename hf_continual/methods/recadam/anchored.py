"""Set up what RecAdam's weights stay near, and how firmly: anchors, Fisher information, and log messages."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import Parameter

from hf_continual.methods.fisher import FisherKind, measure_fisher
from hf_continual.methods.recadam.recall import over_mean, read_fisher
from hf_continual.methods.recadam.schedule import recall_schedule, recall_share
from hf_continual.tensors.anchors import distance, like, read_named
from hf_continual.tensors.flat import local

if TYPE_CHECKING:
    from hf_continual.methods.base import Run
    from hf_continual.methods.recadam.optimizer import RecAdamOptimizer

logger = logging.getLogger(__name__)


def read_anchors(
    optimizer: RecAdamOptimizer, run: Run, named: Mapping[str, Parameter], anchor: str, resumed: bool
) -> None:
    """Read the anchors from the given checkpoint; those of a resumed run must be the same.

    Args:
        optimizer: The optimizer that gets them.
        run: The run.
        named: The anchored weights by name.
        anchor: Folder or Hub id.
        resumed: Whether a checkpoint was loaded.

    Raises:
        FileNotFoundError: If they are gone and no checkpoint has them.
        ValueError: If they differ from those of the resumed run.
    """
    state = optimizer.state
    resumed = resumed and all("anchor" in state[p] for p in named.values())
    try:
        found = read_named(anchor, None, dict(named), run.model)
    except FileNotFoundError:
        if not resumed:
            raise
        logger.info("recadam: %s is gone; the anchors are taken from the checkpoint.", anchor)
        return
    for name, tensor in found.items():
        now, before = like(tensor, named[name]), state[named[name]].get("anchor")
        if resumed and not torch.equal(local(now), local(before)):
            raise ValueError(
                f"RecAdam(anchor={anchor!r}) holds a different {name} than the run to resume stayed near. Give "
                f"the original checkpoint, wherever it is now, or start a new run."
            )
        state[named[name]]["anchor"] = now


def weigh(
    optimizer: RecAdamOptimizer,
    run: Run,
    named: Mapping[str, Parameter],
    file: str,
    rows: tuple[Dataset, FisherKind, int | None] | None,
) -> None:
    """Give the optimizer F divided by its mean, measured on rows or read from a file.

    Args:
        optimizer: The optimizer that gets it, with the anchors.
        run: The run.
        named: The anchored weights by name.
        file: The file that EWC left; read if there are no rows.
        rows: Tokenised rows, the kind of F, and how many rows at most; or None.
    """
    if rows is None:
        found = read_fisher(file, named, run.device)
    else:
        found, _ = measure_fisher(run, *rows, what="recadam: Fisher")
    weighed = over_mean({name: found[name] for name in named}, run.sum if run.is_sharded else None)
    for name, p in named.items():
        optimizer.state[p]["fisher"] = weighed[name]


def say(optimizer: RecAdamOptimizer, named: Mapping[str, Parameter], anchor: str, updates: int) -> None:
    """Log what is anchored and how strongly, and warn of a group that will hardly learn."""
    groups = [g for g in optimizer.param_groups if g["anneal_w"] > 0]
    for group in groups:
        late = recall_schedule(group["anneal"], updates, group["k"], group["t0"], group["anneal_w"])
        if late < 0.5 * group["anneal_w"]:
            logger.warning(
                "recadam: after all %d steps the task weighs only %.3g of %g (anneal=%r, k=%g, t0=%g): hardly "
                "anything will be learned. Give t0 as a fraction of the run, such as t0=0.2.",
                updates, late, group["anneal_w"], group["anneal"], group["k"], group["t0"],
            )  # fmt: skip
            break
    peaks = [g.get("initial_lr", g["lr"]) * g["anchor_strength"] * max(g["anneal_w"], g["floor"]) for g in groups]
    logger.info(
        "recadam: %d tensors with %d parameters stay near %s%s; r is at most %.3g at the peak learning rate%s.",
        len(named), sum(p.numel() for p in named.values()),
        "their values at the start" if anchor == "start" else anchor,
        " (a new adapter's start is A as drawn and B = 0)" if any("lora_" in name for name in named) else "",
        max(peaks), ", times its F" if any("fisher" in optimizer.state.get(p, {}) for p in named.values()) else "",
    )  # fmt: skip


def moved(optimizer: RecAdamOptimizer, params: Iterable[Tensor], run: Run) -> Tensor:
    """Distance of anchored weights from their anchors, see `hf_continual.tensors.anchors.distance`."""
    state = optimizer.state
    pairs = ((p, state[p]["anchor"]) for p in params if "anchor" in state.get(p, {}))
    return distance(pairs, run.sum if run.is_sharded else None)


def pull_now(optimizer: RecAdamOptimizer) -> float:
    """The pull r of the next update at the current learning rate, the largest of the groups; with `fisher` its mean.

    Counters and learning rates are on the host, so nothing waits for the device.
    """
    found = [0.0]
    for group in optimizer.param_groups:
        states = (optimizer.state.get(p, {}) for p in group["params"])
        done = next((int(state["step"]) for state in states if "step" in state), 0)
        found.append(min(max(recall_share(group, done + 1)[1], 0.0), 1.0))
    return max(found)
