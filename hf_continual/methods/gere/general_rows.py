"""General texts as rows of tokens, truncated to the requested length and the model's positions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger(__name__)


def general_tokens(texts: Sequence[Any], tokenizer: Any, max_length: int, positions: int | None) -> list[list[int]]:
    """Tokenise general texts.

    A row begins like any text of the tokenizer, with its beginning-of-text token if there is one: without it the
    states of some models are noise. It gets no end token, since it is a piece of a longer text.

    Args:
        texts: The texts.
        tokenizer: The tokenizer of the run.
        max_length: Maximum number of tokens used of a row.
        positions: Number of positions of the model, or None.

    Returns:
        Rows of at least two tokens, in the order of the texts.

    Raises:
        ValueError: If a text is not a string, or no row has two tokens.
    """
    if other := [i for i, text in enumerate(texts) if not isinstance(text, str)]:
        raise ValueError(
            f"GeRe: {len(other)} of {len(texts)} general rows hold None or a number in 'text', not a text; the first "
            f"is row {other[0]}. Remove them."
        )
    whole: list[list[int]] = tokenizer(list(texts))["input_ids"]
    length = max_length if positions is None else min(max_length, positions)
    if length < max_length and (cut := sum(len(ids) > length for ids in whole)):
        logger.warning(
            "GeRe: max_length=%d was requested, but the model has positions for %d tokens; %d of %d general rows are "
            "truncated there.", max_length, length, cut, len(whole),
        )  # fmt: skip
    tokens = [ids[:length] for ids in whole if min(len(ids), length) > 1]
    if not tokens:
        raise ValueError(
            "GeRe: none of the general rows has two tokens, so there is nothing to predict. Give longer texts."
        )
    if short := len(whole) - len(tokens):
        logger.warning("GeRe: %d of %d general rows have fewer than two tokens and are skipped.", short, len(whole))
    return tokens
