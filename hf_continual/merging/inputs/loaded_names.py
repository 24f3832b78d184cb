"""Names of stored tensors in the loaded model, by transformers' own renaming."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def loaded_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Map each stored tensor to the loaded model's tensor; tensors that loading combines or converts are left out.

    Args:
        model: The loaded model.
        stored: Names in its files.

    Returns:
        Stored name -> name in the model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    steps, there = get_model_conversion_mapping(model), model.state_dict()
    renamings = [s for s in steps if isinstance(s, WeightRenaming)]
    converters = [s for s in steps if isinstance(s, WeightConverter)]
    names = {}
    for name in sorted(stored, key=dot_natural_key):
        new, made = rename_source_key(name, renamings, converters, model.base_model_prefix, there)
        if new not in there and name in there:
            new, made = name, None
        if made is None and new in there:
            names[name] = new
    return names
