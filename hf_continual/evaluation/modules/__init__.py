"""The metrics as modules of HuggingFace `evaluate`: ``evaluate.load(module_path("continual_learning"))``."""

from __future__ import annotations

from pathlib import Path


def module_path(name: str) -> str:
    """Return the file of a metric module, for `evaluate.load`.

    Args:
        name: ``"continual_learning"`` or ``"answer_match"``.

    Returns:
        Its path.

    Raises:
        ValueError: If there is no such module.
    """
    known = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem != "__init__")
    if name not in known:
        raise ValueError(f"unknown metric module {name!r}; the modules are {', '.join(known)}.")
    return str(Path(__file__).parent / f"{name}.py")
