"""The table of merge methods, and methods built from plain data (YAML, a command line).

Importing this module imports no method. A new method is one row here and one file next to this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_continual.merging.protocol import MergeMethod
from hf_continual.named import did_you_mean, imported
from hf_continual.plain import hyper_parameters

MERGES: dict[str, str] = {
    "recall": "hf_continual.merging.methods.recall.method:Recall",
    "kif": "hf_continual.merging.methods.kif.method:Kif",
    "linear": "hf_continual.merging.methods.linear:Linear",
    "interpolate": "hf_continual.merging.methods.interpolate:Interpolate",
    "slerp": "hf_continual.merging.methods.slerp:Slerp",
    "task_arithmetic": "hf_continual.merging.methods.task_arithmetic:TaskArithmetic",
    "ties": "hf_continual.merging.methods.ties:Ties",
    "dare": "hf_continual.merging.methods.dare:Dare",
    "dare_ties": "hf_continual.merging.methods.dare:DareTies",
    "della": "hf_continual.merging.methods.della:Della",
    "breadcrumbs": "hf_continual.merging.methods.breadcrumbs:Breadcrumbs",
    "consensus": "hf_continual.merging.methods.consensus:Consensus",
    "magnitude_max": "hf_continual.merging.methods.magnitude_max:MagnitudeMax",
    "model_stock": "hf_continual.merging.methods.model_stock:ModelStock",
    "fapm": "hf_continual.merging.methods.fapm:FAPM",
}


def merge_class(name: str) -> type[MergeMethod]:
    """Find a merge method.

    Args:
        name: A key of `MERGES`, with ``-`` or ``_``, or ``"package.module:Class"`` for your own.

    Returns:
        The class, imported now.

    Raises:
        ValueError: If it does not exist, or is not a `MergeMethod`.
    """
    target = MERGES.get(name.replace("-", "_"), name if ":" in name else None)
    if target is None:
        raise ValueError(
            f"there is no merge {name!r}.{did_you_mean(name, MERGES)} The merges are {', '.join(MERGES)}; your own is named "
            f"'package.module:Class'."
        )
    try:
        found = imported(target)
    except ImportError as error:
        raise ValueError(f"the merge {name!r} cannot be imported: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, MergeMethod)):
        raise ValueError(f"{name!r} is {found!r}, not a subclass of hf_continual.merging.methods.base.MergeMethod.")
    return found


def build_merge(method: MergeMethod | str, options: Mapping[str, Any]) -> MergeMethod:
    """Build a merge method.

    Args:
        method: A method object, which already has its options; or a name.
        options: Its hyper-parameters.

    Returns:
        The method.

    Raises:
        TypeError: If it does not take an option, or one has the wrong type.
        ValueError: If there is no method of this name, or an option is out of range.
    """
    if isinstance(method, MergeMethod):
        return method
    if not isinstance(method, str):
        raise TypeError(f"method={method!r}: give a name such as 'ties', or a MergeMethod.")
    cls = merge_class(method)
    known = hyper_parameters(cls)
    if unknown := [k for k in options if k not in known]:
        hint = did_you_mean(unknown[0], known)
        raise TypeError(
            f"merge {method} has no option {unknown[0]!r}.{hint} It takes {', '.join(known) or 'no options of its own'}."
        )
    return cls(**options)
