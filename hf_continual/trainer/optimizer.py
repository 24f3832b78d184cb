"""Parameter groups for an optimizer that a method supplies, and the check that an optimizer is complete."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import nn

    from hf_continual.methods.base import OptimizerChoice
    from hf_continual.trainer.live import LiveTrainer

logger = logging.getLogger(__name__)


def parameter_groups(
    model: nn.Module, choice: OptimizerChoice, decayed: Collection[str], weight_decay: float
) -> list[dict[str, Any]]:
    """Group the trainable parameters by weight decay, as the trainer does, and by the method's options.

    Args:
        model: The model to train.
        choice: The method's optimizer with its options by name pattern.
        decayed: Names of the parameters that weight decay applies to.
        weight_decay: Their decay.

    Returns:
        Groups with at least one parameter each; options of a pattern win over the decay.

    Raises:
        ValueError: If no parameter is trainable, or a pattern matches none.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    matched: set[int] = set()
    names: list[str] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        names.append(name)
        hits = [i for i, (pattern, _) in enumerate(choice.options) if re.search(pattern, name)]
        matched.update(hits)
        key = (hits[0] if hits else -1, name in decayed)
        if key not in groups:
            options = choice.options[hits[0]][1] if hits else {}
            decay = {"weight_decay": weight_decay if name in decayed else 0.0}
            groups[key] = {"params": [], **({} if "weight_decay" in choice.kwargs else decay), **options}
        groups[key]["params"].append(parameter)
    if not names:
        raise ValueError("No parameter is trainable, so there is nothing to optimize. Check what is frozen.")
    for i, (pattern, _) in enumerate(choice.options):
        if i not in matched:
            raise ValueError(
                f"The pattern {pattern!r} matches none of the {len(names)} trainable parameters, such as "
                f"{', '.join(names[:3])}. It is a regular expression searched in the parameter's name."
            )
    return list(groups.values())


def check_holds_trained(model: nn.Module, optimizer: Any, given: bool) -> None:
    """Refuse an optimizer that lacks a trainable parameter: it would get gradients and never move.

    Surgery on the model (an untied head, a new adapter, a layer unfrozen) leaves behind an optimizer that was built
    before it. Parameters that left the model are logged: they get no gradient and only use memory.

    Args:
        model: The unwrapped model.
        optimizer: The live optimizer, without accelerate's wrapper.
        given: Whether it was given as an object; one that the trainer made may hold no model parameter at all, such
            as transformers' stand-in for optimizers per layer.

    Raises:
        ValueError: If a trainable parameter is missing; names the first three.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters(remove_duplicate=False))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, p in trained.items() if id(p) not in held]
    if not given and not held & {id(p) for p in named.values()}:
        return
    if missing:
        raise ValueError(
            f"The optimizer ({type(optimizer).__name__}) lacks {len(missing)} of {len(trained)} trainable parameters, such "
            f"as {', '.join(missing[:3])}: it was built before they became part of the model or trainable, so they would "
            f"never move. Give the class instead, which the trainer builds after all changes to the model: "
            f"optimizer_cls_and_kwargs=({type(optimizer).__name__}, {{'lr': ...}}). If they should not be trained, set "
            f"requires_grad=False on them."
        )
    if left := len(held - {id(p) for p in named.values()}):
        logger.warning(
            "%d parameters of the optimizer (%s) are not, or no longer, part of the model: they get no gradient from it.",
            left, type(optimizer).__name__,
        )  # fmt: skip


def check_live_optimizer(trainer: LiveTrainer) -> None:
    """Refuse an optimizer that lacks a trainable parameter; not under DeepSpeed and FSDP1, which flatten them."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    flattened = trainer.is_deepspeed_enabled or (plugin is not None and plugin.fsdp_version == 1)
    if not flattened:
        live = trainer.run.optimizer
        check_holds_trained(trainer.run.model, live, given=live is trainer.given_optimizer)
