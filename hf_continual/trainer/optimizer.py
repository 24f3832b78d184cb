"""Parameter groups for an optimizer that a method brings."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import nn

    from hf_continual.methods.base import OptimizerChoice


def parameter_groups(
    model: nn.Module, choice: OptimizerChoice, decayed: Collection[str], weight_decay: float
) -> list[dict[str, Any]]:
    """Group the trainable parameters by weight decay, as the trainer does, and by the method's options.

    Args:
        model: The model to train.
        choice: The method's optimizer with its options by name pattern.
        decayed: Names of the parameters that weight decay applies to.
        weight_decay: Decay of those.

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
