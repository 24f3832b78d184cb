"""Which texts all models see: chosen from the new task by the newest model, or written by it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_continual.data.own_words import own_words
from hf_continual.merging.inputs.members import Member
from hf_continual.merging.inputs.run_model import Setting, cached_representations, loaded, token_ids
from hf_continual.merging.methods.recall.typical_samples import typical_samples


def typical_texts(
    anchor: Member, tokenizer: Any, calibration: Any, choices: Mapping[str, Any], setting: Setting, cache: Path
) -> tuple[list[list[int]], list[int]]:
    """Token ids of the typical texts, and their places in the calibration.

    Args:
        anchor: The newest model.
        tokenizer: Its tokenizer.
        calibration: Texts or rows; not looked at where the model writes them.
        choices: The options of `merge_with_recall`.
        setting: How models are run.
        cache: Where representations are kept.

    Returns:
        Ids and places.
    """
    number, seed = choices["num_typical"], choices["seed"]
    if choices["calibration_mode"] == "self":
        with loaded(anchor, setting) as model:
            calibration = own_words(model, tokenizer, number, min(128, choices["max_length"]), seed, batch_size=number)
    texts, places = token_ids(calibration, tokenizer, choices["pool_size"], choices["max_length"])
    if choices["calibration_mode"] == "self" or len(texts) <= number:
        return texts, places
    last_ND = cached_representations(anchor, texts, setting, cache)[-1]
    rows = typical_samples(last_ND.astype(float), number, seed)
    return [texts[i] for i in rows], [places[i] for i in rows]
