"""Rows prepared for scoring: prompts and answers as tokens, and the rule that decides when an answer is right."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_continual.ends import AddedTokens, added_tokens, end_tokens, up_to_end
from hf_continual.evaluation.frame import Frame, answer_text, frame_of
from hf_continual.evaluation.trained import Row, has_thoughts, reference, trained_tokens
from hf_continual.tensors.reference import tokens_in_front

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.nn import Module

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """A prompt and its right answer.

    Args:
        prompt: Tokens of the prompt, at least one.
        answer: Tokens of the answer, up to and including its end if it was trained with one.
        ends: Tokens that end an answer.
        frame: What the chat template puts around the answer.
        reference: The answer's text as in the row.
        added: The tokenizer's added tokens.
        thinks: Whether the answer includes thoughts.
    """

    prompt: list[int]
    answer: list[int]
    ends: frozenset[int]
    frame: Frame
    reference: str
    added: AddedTokens
    thinks: bool = False

    @property
    def ended(self) -> bool:
        """Whether the answer was trained with an end."""
        return bool(self.answer) and self.answer[-1] in self.ends

    def accepts(self, said: Sequence[int]) -> bool:
        """Whether tokens are the answer's and then any end; if it was trained without one, whether they start with it."""
        if not self.ended:
            return list(said[: len(self.answer)]) == self.answer
        return len(said) == len(self.answer) and list(said[:-1]) == self.answer[:-1] and said[-1] in self.ends

    def text(self, said: Sequence[int], tokenizer: Any) -> str:
        """Generated tokens as text, to compare with `wanted`."""
        return answer_text(said, self.frame, self.ends, tokenizer, self.added, self.reference)

    def wanted(self, tokenizer: Any) -> str:
        """The answer as the tokenizer decodes it: a tokenizer may lose a space, which no model can then generate."""
        return self.text(self.answer, tokenizer)


def read_questions(model: Any, tokenizer: Any, rows: Dataset | Sequence[Row]) -> list[Question]:
    """Prepare rows for scoring.

    Args:
        model: The causal language model that will be scored; its ends and number of positions are used.
        tokenizer: Its tokenizer.
        rows: ``{"prompt", "completion"}`` as strings or messages, or ``{"messages"}``.

    Returns:
        One question per row.

    Raises:
        ValueError: If rows cannot be scored; the message says how many and why.
    """
    known, added = end_tokens(model, tokenizer), added_tokens(tokenizer)
    plain = [dict(row) for row in rows]
    for row in plain:
        check_one_answer(row)
    frames = [frame_of(row, tokenizer, known, added) for row in plain]
    ends = known | {frame.end for frame in frames if frame.end is not None}
    split = [trained_tokens(row, tokenizer) for row in plain]
    questions = [
        Question(prompt, up_to_end(answer, ends), ends, frame, reference(row), added, has_thoughts(row))
        for row, frame, (prompt, answer) in zip(plain, frames, split, strict=True)
    ]
    _check_empty(questions, plain)
    check_lengths(model, [len(q.prompt) + len(q.answer) for q in questions])
    return questions


def check_one_answer(row: Row) -> None:
    """Refuse a completion of several messages.

    Args:
        row: A row to score.

    Raises:
        ValueError: If its completion is not one answer.
    """
    completion = row.get("completion")
    if not isinstance(completion, str) and completion is not None and len(completion) != 1:
        raise ValueError(
            f"a completion of {len(completion)} messages is not one answer: a model generates one and stops. "
            f"Move all messages but the last into the prompt, or score every assistant turn: turns: all."
        )


def _check_empty(questions: Sequence[Question], rows: Sequence[dict[str, Any]]) -> None:
    mute = [i for i, q in enumerate(questions) if not q.prompt]
    if mute:
        shown = rows[mute[0]].get("prompt")
        raise ValueError(
            f"the prompt {shown!r} has no tokens before the answer, and a model cannot start from nothing: row {mute[0]}, "
            f"and {len(mute)} of {len(questions)} rows in all. Drop these rows, or use a tokenizer that adds a token at the start of texts."
        )
    empty = [i for i, q in enumerate(questions) if not q.reference.strip()]
    if questions and len(empty) == len(questions):
        raise ValueError(
            f"all {len(questions)} rows have an empty answer, so there is nothing to score. Does the completion "
            f"column hold the answers?"
        )
    if empty:
        logger.warning(
            "%d of %d rows have an empty answer (the first is row %d): for these, an empty prediction is right.",
            len(empty), len(questions), empty[0],
        )  # fmt: skip


def positions(model: Any) -> int | None:
    """The number of positions that a model was made for; None if it has no such limit."""
    base: Any = model.get_base_model() if hasattr(model, "peft_config") else model
    config = getattr(base, "config", None)
    found = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    return found - tokens_in_front(model) if isinstance(found, int) and found > 0 else None


def check_lengths(model: Any, lengths: Sequence[int]) -> None:
    """Refuse rows that are longer than a table of positions; warn if positions are computed.

    Args:
        model: A causal language model.
        lengths: Tokens of each row.

    Raises:
        ValueError: If a row has more tokens than the model has learned positions.
    """
    most = positions(model)
    longer = [n for n in lengths if most is not None and n > most]
    if most is None or not longer:
        return
    what = (
        f"{len(longer)} of {len(lengths)} rows take up to {max(longer)} tokens with their answer, but the model has "
        f"{most} positions (max_position_embeddings)"
    )
    if _has_table(model, most):
        raise ValueError(f"{what}. Shorten the prompts (max_prompt_tokens in a plan), or drop these rows.")
    logger.warning("%s: it was not made for texts of this length, and such scores mean little.", what)


def _has_table(model: Module, most: int) -> bool:
    """Whether positions are rows of an embedding, as in GPT-2 and OPT (which keeps two rows more)."""
    words = model.get_input_embeddings()  # pyrefly: ignore
    found = [getattr(m, "num_embeddings", None) for m in model.modules() if m is not words]
    return most in found or most + 2 in found
