"""Rows whose answers a model writes itself: a prompt taken from an old row, and rows packed into a few tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_continual.data.sample_format import IGNORED
from hf_continual.ends import up_to_end

Row = dict[str, list[int]]


@dataclass(frozen=True)
class Asked:
    """A prompt to answer, and the answer that its row has.

    Args:
        prompt: Tokens before the answer.
        answer: Tokens of the row's own answer, up to and including its end, if it has one.
        tail: Trained tokens that the row has after that end, such as a template's line break.
        ended: Whether an answer needs an end: the row's own has one, and is not the second half of a text.
    """

    prompt: list[int]
    answer: list[int]
    tail: list[int]
    ended: bool

    def row(self, written: Sequence[int]) -> Row:
        """The row with another answer: only the answer, and what follows its end, is trained."""
        said = [*written, *self.tail]
        return {"input_ids": [*self.prompt, *said], "labels": [IGNORED] * len(self.prompt) + said}


def asked_of(tokens: np.ndarray, labels: np.ndarray, ends: Collection[int]) -> Asked | None:
    """The prompt of a row, and its last answer.

    Args:
        tokens: Tokens (S) of the row.
        labels: Its labels (S); -100 where a token is not trained.
        ends: Tokens that end an answer.

    Returns:
        Of a conversation, the last trained part is the answer and all before it the prompt. Of a text, trained from its first
        token, the first half is the prompt. None if no token would be before the answer, or the answer would be empty.
    """
    trained = np.flatnonzero(labels != IGNORED)
    if not len(trained):
        return None
    last = int(trained[-1])
    gaps = np.flatnonzero(np.diff(trained) > 1)
    start = int(trained[gaps[-1] + 1]) if len(gaps) else int(trained[0])
    text = start == 0
    start = (last + 1) // 2 if text else start
    own = tokens[start : last + 1].tolist()
    answer = up_to_end(own, ends)
    if not start or not answer or answer[0] in ends:
        return None
    prompt = tokens[:start].tolist()
    # A text may stop anywhere; an answer without its end would teach the model to ramble.
    return Asked(prompt, answer, [], False) if text else Asked(prompt, answer, own[len(answer) :], answer[-1] in ends)


def packed_rows(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Rows as three int64 tensors: all tokens, the length of each row, and the length of its prompt."""
    prompts = [sum(label == IGNORED for label in row["labels"]) for row in rows]
    return {
        "tokens": torch.tensor([token for row in rows for token in row["input_ids"]], dtype=torch.int64),
        "lengths": torch.tensor([len(row["input_ids"]) for row in rows], dtype=torch.int64),
        "prompts": torch.tensor(prompts, dtype=torch.int64),
    }


def unpacked_rows(packed: Mapping[str, Any]) -> list[Row]:
    """The rows that `packed_rows` packed."""
    found = []
    for part, prompt in zip(
        packed["tokens"].split(packed["lengths"].tolist()), packed["prompts"].tolist(), strict=True
    ):
        tokens = part.tolist()
        found.append({"input_ids": tokens, "labels": [IGNORED] * prompt + tokens[prompt:]})
    return found
