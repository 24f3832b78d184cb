"""The kinds of modules that change inference, by name, for code that needs no torch: cards, checks of plans, merging."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG = "adapter_config.json"
PROMPT_POOL, MOE_LORA, SAPT_LORA = "PROMPT_POOL", "MOE_LORA", "SAPT_LORA"


@dataclass(frozen=True)
class KindName:
    """The names of a kind elsewhere.

    Args:
        title: Its name as text, with an article.
        method: The method that trains it, as in the table of methods.
        loader: The function of `hf_continual` that loads it.
        sizes: Entries of its configuration that hold for all tasks, and that a card shows.
    """

    title: str
    method: str
    loader: str
    sizes: tuple[str, ...]


NAMES: dict[str, KindName] = {
    PROMPT_POOL: KindName("a prompt pool", "l2p", "load_prompt_pool", ("pool", "length", "top")),
    MOE_LORA: KindName(
        "a mixture of LoRA experts",
        "moe_lora",
        "load_moe_lora",
        ("experts", "gate", "r", "lora_alpha", "top_k", "task_size"),
    ),
    SAPT_LORA: KindName(
        "a mixture of LoRA pairs, one per task", "sapt_lora", "load_sapt_lora", ("r", "lora_alpha", "hidden")
    ),
}


METHODS = tuple(named.method for named in NAMES.values())


def sizes_in(folder: str | Path) -> dict[str, Any]:
    """The kind in a folder and its configuration, in the format of a card; empty if there is none."""
    if (kind := kind_in(folder)) is None:
        return {}
    config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    return {"kind": kind, **{k: v for k, v in config.items() if k in NAMES[kind].sizes}}


def kind_in(folder: str | Path) -> str | None:
    """The kind that a folder holds; None for a plain adapter, a full model, or an unreadable folder."""
    try:
        found = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8")).get("peft_type")
    except (OSError, ValueError, AttributeError):
        return None
    return found if found in NAMES else None
