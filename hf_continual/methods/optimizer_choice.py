"""An optimizer that a method supplies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.optim import Optimizer


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer that a method supplies.

    Args:
        cls: A `torch.optim.Optimizer`.
        kwargs: Its constructor's arguments except the parameters.
        options: Extra options of single parameters by name pattern (regular expression, searched in
            the parameter's name), first match wins. Parameters with different options get their own
            groups when the optimizer is built, never later.
    """

    cls: type[Optimizer]
    kwargs: Mapping[str, Any]
    options: Sequence[tuple[str, Mapping[str, Any]]] = ()
