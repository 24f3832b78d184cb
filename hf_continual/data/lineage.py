"""Which base fine-tuned weights come from, so that a later task finds what was kept of that base and of no other.

Files of the cache are called ``STEM-WEIGHTS.ENDING``, where STEM stands for everything but the weights. When a task
ends, a marker named after the weights that it ends with says which base it began from; the next task begins with these.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hf_continual.durable import write_text

logger = logging.getLogger(__name__)

DIGITS = 16


def remember(folder: Path, weights: str, base: str) -> None:
    """Note that weights come from a base; both are fingerprints."""
    if weights != base:
        write_text(folder / f"{weights[:32]}.base", base)


def kept_of_base(folder: Path, stem: str, ending: str, weights: str, moved: bool) -> tuple[Path, str | None]:
    """The file that belongs to the base of some weights.

    Args:
        folder: The cache.
        stem: Everything but the weights, as a key.
        ending: Of the file's name.
        weights: Fingerprint of the weights that are here.
        moved: Whether they may have been fine-tuned by an earlier task.

    Returns:
        The file, and the fingerprint to make it with; None where it must be there, as its base is not here.

    Raises:
        ValueError: If the weights have moved and no file is known to be that of their base.
    """
    marker = folder / f"{weights[:32]}.base"
    if marker.is_file():
        known = folder / f"{stem}-{marker.read_text(encoding='utf-8').strip()[:DIGITS]}{ending}"
        if known.is_file():
            return known, None
    if not moved:
        return folder / f"{stem}-{weights[:DIGITS]}{ending}", weights
    others = sorted(folder.glob(f"{stem}-*{ending}"))
    if marker.is_file() or len(others) != 1:
        raise ValueError(
            f"GeRe(reference='base'): this task begins with fine-tuned weights, and {folder} holds {len(others)} files for "
            f"these rows and this model that could be their base's, not one{_nearest(folder)}. Run the first task with the "
            f"same cache_dir, one for this sequence, with the same rows and tokenizer; or say reference='task_start'."
        )
    logger.warning("%s is taken for that of the base of this sequence: no other fits.", others[0])
    return others[0], None


def facts_of(file: Path) -> dict[str, Any]:
    """What a file of states was made for; empty if it cannot be read."""
    try:
        with safe_open(file, "pt") as opened:
            return json.loads((opened.metadata() or {})["facts"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return {}


def _nearest(folder: Path) -> str:
    made = [facts for file in sorted(folder.glob("*.safetensors")) if (facts := facts_of(file))]
    shown = [", ".join(f"{k}={v if len(str(v)) < 24 else str(v)[:12]}" for k, v in facts.items()) for facts in made[:2]]
    return "".join(f"; one was made for {text}" for text in shown)
