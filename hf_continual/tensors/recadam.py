"""The former place of `hf_continual.methods.recadam`; scripts that import from here go on working."""

from __future__ import annotations

import warnings
from typing import Any

from hf_continual.named import imported


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    warnings.warn(
        "hf_continual.tensors.recadam is now hf_continual.methods.recadam: import from there.",
        DeprecationWarning,
        stacklevel=2,
    )
    return imported(f"hf_continual.methods.recadam:{name}")
