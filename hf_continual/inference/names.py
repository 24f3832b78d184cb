"""The kinds of modules that change inference, by name, for those who need no torch: cards, checks of plans, merging."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

CONFIG = "adapter_config.json"
PROMPT_POOL, MOE_LORA, SAPT_LORA = "PROMPT_POOL", "MOE_LORA", "SAPT_LORA"


@dataclass(frozen=True)
class KindName:
    """What a kind is called elsewhere.

    Args:
        title: In words, with its article.
        method: The method that trains it, as the table of methods has it.
        loader: The function of `hf_continual` that loads it.
    """

    title: str
    method: str
    loader: str


NAMES: dict[str, KindName] = {
    PROMPT_POOL: KindName("a prompt pool", "l2p", "load_prompt_pool"),
    MOE_LORA: KindName("a mixture of LoRA experts", "moe_lora", "load_moe_lora"),
    SAPT_LORA: KindName("a mixture of LoRA pairs, one per task", "sapt_lora", "load_sapt_lora"),
}


def kind_in(folder: str | Path) -> str | None:
    """The kind that a folder holds; None for a plain adapter, a whole model and what cannot be read."""
    try:
        found = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8")).get("peft_type")
    except (OSError, ValueError, AttributeError):
        return None
    return found if found in NAMES else None
