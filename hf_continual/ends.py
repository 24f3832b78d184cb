"""Which tokens end an answer, and which are never part of its text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token at which generation stops: the tokenizer's own, and all that the model's generation config names.

    Args:
        model: A causal language model with or without adapters, or None.
        tokenizer: Its tokenizer.

    Returns:
        Token ids; empty where neither names one.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    configured = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
    configured = configured.tolist() if hasattr(configured, "tolist") else configured  # a tensor after `generate`
    several = list(configured) if isinstance(configured, Iterable) else [configured]
    return frozenset(int(i) for i in [tokenizer.eos_token_id, *several] if i is not None)


def special_tokens(tokenizer: Any) -> frozenset[int]:
    """Tokens that are not part of a text: the tokenizer's special ones, without the one for unknown words."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    return frozenset({*tokenizer.all_special_ids, *added} - unknown)


def padding_token(tokenizer: Any) -> int:
    """A token to fill masked places with, whatever the tokenizer has."""
    found = [i for i in (getattr(tokenizer, "pad_token_id", None), tokenizer.eos_token_id) if i is not None]
    return found[0] if found else 0
