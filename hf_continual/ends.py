"""Tokens that end an answer, and tokens that are never part of its text."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token at which generation stops: the tokenizer's own, and all in the model's generation config.

    Args:
        model: A causal language model with or without adapters, or None.
        tokenizer: Its tokenizer.

    Returns:
        Token ids; empty if neither has one.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    configured = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
    configured = configured.tolist() if hasattr(configured, "tolist") else configured  # a tensor after `generate`
    several = list(configured) if isinstance(configured, Iterable) else [configured]
    return frozenset(int(i) for i in [tokenizer.eos_token_id, *several] if i is not None)


def up_to_end(answer: list[int], ends: Collection[int]) -> list[int]:
    """An answer up to and including its first end, whole without one: a template may add a line break, which nobody generates."""
    stop = next((i for i, token in enumerate(answer) if token in ends), len(answer))
    return answer[: stop + 1]


@dataclass(frozen=True)
class AddedTokens:
    """Tokens added to a tokenizer's vocabulary; looked up once, since a look-up may take milliseconds.

    Args:
        special: Tokens that are not part of a text, except the one for unknown words.
        texts: Text of every added token, special or not.
    """

    special: frozenset[int]
    texts: Mapping[int, str]


def added_tokens(tokenizer: Any) -> AddedTokens:
    """Look up a tokenizer's special and added tokens."""
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    return AddedTokens(frozenset(special - unknown), {i: token.content for i, token in added.items()})


def padding_token(tokenizer: Any) -> int:
    """A token to fill masked positions with, for any tokenizer."""
    found = [i for i in (getattr(tokenizer, "pad_token_id", None), tokenizer.eos_token_id) if i is not None]
    return found[0] if found else 0
