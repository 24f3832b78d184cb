"""Exact match of answers: by teacher forcing in one forward pass, or by greedy generation.

An answer is right if greedy decoding yields exactly its tokens and then the end. Teacher forcing decides that
without generating: the greedy output equals the answer if and only if, fed the answer, the model ranks each of its
tokens and an end first. Any token that ends generation counts as an end: the tokenizer's, those of the model's generation
config, and the one with which the chat template ends a turn. If a template ends turns with plain text, that text is
part of the answer and nothing is required after it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from hf_continual.ends import padding_token
from hf_continual.evaluation.generation import Output, cut_at, greedy, stop_strings
from hf_continual.evaluation.match import Match, find_match
from hf_continual.evaluation.prompts import NOT_NUMBERS, batches_by_length, decoder, evaluating
from hf_continual.evaluation.questions import Question, positions, read_questions
from hf_continual.evaluation.result import RowScore, Scored
from hf_continual.evaluation.trained import Row
from hf_continual.evaluation.turns import Turns, by_turns, check_turns
from hf_continual.inference.kinds import asked

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


def teacher_forced(
    model: Any, tokenizer: Any, rows: Dataset | Sequence[Row], batch_size: int = 32, turns: Turns = "last"
) -> Scored:
    """Exact match and answer likelihood from one forward pass per batch.

    Only the answers' positions go through the language-model head.

    Args:
        model: A causal language model, with or without adapters; its training mode is restored.
        tokenizer: Its tokenizer.
        rows: ``{"prompt", "completion"}`` as strings or messages, or ``{"messages"}`` that end with the answer.
        batch_size: Rows per forward pass.
        turns: Which assistant turns of a conversation are answers: the ``"last"`` message, or ``"all"`` of them, each
            after everything that the row has before it; a row's score is then the mean over its turns.

    Returns:
        1 for rows that greedy decoding would answer exactly, and each answer's NLL. A wrong row's prediction ends
        with its first differing token.

    Raises:
        ValueError: If rows cannot be scored, or the model's logits are not numbers.
    """
    if check_turns(turns) == "all":
        return by_turns(rows, lambda flat: teacher_forced(model, tokenizer, flat, batch_size))
    questions = read_questions(model, tokenizer, rows)
    _say_that_thoughts_count(questions)
    found: dict[int, RowScore] = {}
    parts = decoder(model)
    with evaluating(model) as device:
        for picked in batches_by_length(questions, [len(q.prompt) + len(q.answer) for q in questions], batch_size):
            batch = [questions[i] for i in picked]
            said, means = _forced(model, parts, batch, padding_token(tokenizer), device)
            for i, question, tokens, loss in zip(picked, batch, said, means, strict=True):
                found[i] = _row(tokens, question, loss, tokenizer)
    return Scored([found[i] for i in range(len(questions))], "exact match, teacher forced")


def _forced(
    model: Any, parts: tuple[Any, Any], batch: Sequence[Question], pad: int, device: torch.device
) -> tuple[list[list[int]], list[float]]:
    """The most likely token at each position of each answer, and the mean NLL of each answer."""
    body, head = parts
    width = max(len(q.prompt) + len(q.answer) for q in batch)
    ids_BS = torch.full((len(batch), width), pad)
    mask_BS = torch.zeros_like(ids_BS)
    for i, q in enumerate(batch):
        size = len(q.prompt) + len(q.answer)
        ids_BS[i, :size] = torch.tensor([*q.prompt, *q.answer])
        mask_BS[i, :size] = 1
    places_S = torch.arange(width, device=device)
    question_BS = places_S < torch.tensor([[len(q.prompt)] for q in batch], device=device)
    with asked(model, question_BS):
        out = body(input_ids=ids_BS.to(device), attention_mask=mask_BS.to(device), use_cache=False)
    hidden_BSD = out.last_hidden_state
    # Position t predicts token t + 1, so an answer is predicted starting from the last token of its prompt.
    states = [hidden_BSD[i, len(q.prompt) - 1 : len(q.prompt) + len(q.answer) - 1] for i, q in enumerate(batch)]
    logits = head(torch.cat(states)).float()
    best, chosen = logits.max(-1)
    if bool(best.isnan().any()):
        raise ValueError(NOT_NUMBERS)
    gold = torch.tensor([token for q in batch for token in q.answer], device=device)
    sizes = [len(q.answer) for q in batch]
    nll = torch.nn.functional.cross_entropy(logits, gold, reduction="none").split(sizes)
    return [x.tolist() for x in chosen.cpu().split(sizes)], torch.stack([x.mean() for x in nll]).tolist()


def _row(said: list[int], question: Question, nll: float, tokenizer: Any) -> RowScore:
    pairs = zip(said, question.answer, strict=True)
    wrong = next((k for k, (a, b) in enumerate(pairs) if a != b), len(said))
    return RowScore(
        float(question.accepts(said)),
        prediction=question.text(said[: wrong + 1], tokenizer),
        reference=question.reference,
        also={"nll": nll},
    )


def generated(
    model: Any,
    tokenizer: Any,
    rows: Dataset | Sequence[Row],
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    match: str | Match | None = None,
    stop: Sequence[str] = (),
    turns: Turns = "last",
    loss: bool = False,
) -> Scored:
    """Score answers by batched greedy generation, left padded, until an end or a stop string.

    Predictions and references are passed to `match` as text without special tokens and without what a chat
    template puts around an answer (an empty block of thoughts, the name of a channel). The reference is the text that the
    tokenizer decodes from its tokens.

    Args:
        model: A causal language model; its training mode is restored.
        tokenizer: Its tokenizer.
        rows: ``{"prompt", "completion"}`` as strings or messages, or ``{"messages"}`` that end with the answer.
        batch_size: Rows per batch.
        max_new_tokens: Limit; by default one more than the answer, so that a model that does not stop is noticed.
        match: When an answer is right, by name (`hf_continual.evaluation.match`) or as a function of prediction
            and reference; None requires the exact tokens of the answer and an end.
        stop: Strings that end an answer; they are cut off, from references as well.
        turns: Which assistant turns of a conversation are answers: the ``"last"`` message, or ``"all"`` of them, each
            after everything that the row has before it; a row's score is then the mean over its turns.
        loss: Whether to compute the loss of the whole right answers too, in nats per token, with one forward pass per batch.

    Returns:
        The score and the answer of each row. Rows that `max_new_tokens` cut short have ``also["cut"]`` 1; with `loss`
        ``also["nll"]`` is that of `teacher_forced`.

    Raises:
        ValueError: If rows cannot be scored, an option has no effect, or the model's logits are not numbers.
    """
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room for an answer; give at least 1, or None.")
    if check_turns(turns) == "all":
        return by_turns(
            rows, lambda flat: generated(model, tokenizer, flat, batch_size, max_new_tokens, match, stop, loss=loss)
        )
    rule = None if match is None else find_match(match)
    stop = stop_strings(stop)
    questions = read_questions(model, tokenizer, rows)
    if rule is None:
        _say_that_thoughts_count(questions)
    _say_what_cannot_be_right(questions, max_new_tokens, stop, tokenizer)
    limits = [_limit(q, max_new_tokens, positions(model)) for q in questions]
    ends = frozenset[int]().union(*(q.ends for q in questions))
    produced = greedy(model, tokenizer, [q.prompt for q in questions], limits, batch_size, stop, ends)
    scored = [
        _scored(*each, rule, max_new_tokens, stop, tokenizer) for each in zip(questions, produced, limits, strict=True)
    ]
    if loss:
        forced = teacher_forced(model, tokenizer, rows, batch_size).rows
        scored = [replace(own, also={**own.also, **of.also}) for own, of in zip(scored, forced, strict=True)]
    named = "exact match" if rule is None else getattr(rule, "__name__", str(match))
    return Scored(scored, f"{named}, greedy")


def _scored(
    question: Question,
    out: Output,
    limit: int,
    rule: Match | None,
    most: int | None,
    stop: Sequence[str],
    tokenizer: Any,
) -> RowScore:
    text, stopped = cut_at(question.text(out.tokens, tokenizer), stop)
    wanted = question.wanted(tokenizer)
    wanted = next((wanted.removesuffix(s) for s in stop if wanted.endswith(s)), wanted)
    ended = out.stopped or stopped or out.tokens[-1] in question.ends
    if rule is None:
        value = float(question.accepts(out.tokens) or ((out.stopped or stopped) and text == wanted))
    else:
        value = float(rule(text, wanted))
    cut = most is not None and not ended and len(out.tokens) >= limit
    return RowScore(value, prediction=text, reference=question.reference, also={"cut": 1.0} if cut else {})


def _limit(question: Question, most: int | None, places: int | None) -> int:
    # One more than the answer and its end, to notice a model that does not stop.
    limit = (len(question.answer) + question.ended) if most is None else most
    # The last token is not fed back.
    return limit if places is None else max(1, min(limit, places - len(question.prompt) + 1))


def _say_that_thoughts_count(questions: Sequence[Question]) -> None:
    thinking = sum(q.thinks for q in questions)
    if thinking:
        logger.warning(
            "%d of %d answers come with thoughts, and exact match requires exactly the same thoughts. To score what follows "
            "them, generate: metric: {generated: {match: exact, max_new_tokens: 512}}.", thinking, len(questions),
        )  # fmt: skip


def _say_what_cannot_be_right(
    questions: Sequence[Question], most: int | None, stop: Sequence[str], tokenizer: Any
) -> None:
    longer = [len(q.answer) for q in questions if most is not None and len(q.answer) > most]
    if longer:
        logger.warning(
            "max_new_tokens=%s cuts %d of %d answers short, which take up to %d tokens with their end: they cannot "
            "be answered in full. Leave it out, or raise it.", most, len(longer), len(questions), max(longer),
        )  # fmt: skip
    inside = [q for q in questions if any(s in q.wanted(tokenizer).removesuffix(s) for s in stop)] if stop else []
    if inside:
        logger.warning(
            "%d of %d answers contain a stop string before their end, such as %r: they cannot be answered in full.",
            len(inside), len(questions), inside[0].reference,
        )  # fmt: skip
