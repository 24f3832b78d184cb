"""Exact match of answers: by teacher forcing in one forward pass, or by greedy generation.

An answer is right when greedy decoding yields exactly its tokens and then the end of sequence. Teacher forcing
decides that without generating: the greedy output equals the answer if and only if, fed the answer, the model
ranks each of its tokens and the end first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hf_continual.evaluation.generation import greedy
from hf_continual.evaluation.match import Match, find_match
from hf_continual.evaluation.prompts import batches_by_length, decoder, encode, evaluating, reference
from hf_continual.evaluation.result import RowScore, Scored

if TYPE_CHECKING:
    from datasets import Dataset


def teacher_forced(model: Any, tokenizer: Any, rows: Dataset, batch_size: int = 32) -> Scored:
    """Exact match and answer likelihood from one forward pass per batch.

    Only the answers' positions go through the language-model head.

    Args:
        model: A causal language model, with or without adapters; its training mode is restored.
        tokenizer: Its tokenizer, with an end-of-sequence token.
        rows: ``{"prompt", "completion"}``, as strings or messages.
        batch_size: Rows per forward pass.

    Returns:
        1 for rows that greedy decoding would answer exactly, and each answer's NLL. A wrong row's prediction ends
        with the first token that differs.
    """
    encoded = [encode(row, tokenizer) for row in rows]  # pyrefly: ignore[bad-argument-type]
    found: dict[int, RowScore] = {}
    body, head = decoder(model)
    with evaluating(model) as device:
        for picked in batches_by_length(encoded, [len(p) + len(a) for p, a in encoded], batch_size):
            batch = [encoded[i] for i in picked]
            width = max(len(p) + len(a) for p, a in batch)
            ids = torch.full((len(batch), width), tokenizer.eos_token_id)
            mask = torch.zeros_like(ids)
            for i, (prompt, answer) in enumerate(batch):
                ids[i, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
                mask[i, : len(prompt) + len(answer)] = 1
            hidden_BSD = body(
                input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
            ).last_hidden_state
            # Position t predicts token t + 1, so an answer is predicted from the last token of its prompt on.
            states = [hidden_BSD[i, len(p) - 1 : len(p) + len(a) - 1] for i, (p, a) in enumerate(batch)]
            logits = head(torch.cat(states)).float()
            gold = torch.tensor([token for _, a in batch for token in a], device=device)
            sizes = [len(a) for _, a in batch]
            nll = torch.nn.functional.cross_entropy(logits, gold, reduction="none").split(sizes)
            means = torch.stack([x.mean() for x in nll]).tolist()
            chosen = logits.argmax(-1).cpu().split(sizes)
            for i, (_, answer), said, loss in zip(picked, batch, chosen, means, strict=True):
                found[i] = _row(said.tolist(), answer, loss, rows[i], tokenizer)
    return Scored([found[i] for i in range(len(encoded))], "exact match, teacher forced")


def _row(said: list[int], answer: list[int], nll: float, row: dict[str, Any], tokenizer: Any) -> RowScore:
    wrong = next((k for k, (a, b) in enumerate(zip(said, answer, strict=True)) if a != b), None)
    shown = said[:-1] if wrong is None else said[: wrong + 1]
    return RowScore(
        float(wrong is None), prediction=tokenizer.decode(shown), reference=reference(row), also={"nll": nll}
    )


def generated(
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    match: str | Match | None = None,
    stop: Sequence[str] = (),
) -> Scored:
    """Score answers by batched greedy generation, left padded, until the end of sequence or a stop string.

    Args:
        model: A causal language model; its training mode is restored.
        tokenizer: Its tokenizer.
        rows: ``{"prompt", "completion"}``, as strings or messages.
        batch_size: Rows per batch.
        max_new_tokens: Limit; by default one more than the longest answer of a batch.
        match: When an answer is right, by name (`hf_continual.evaluation.match`) or as a function of prediction
            and reference; None demands the very tokens of the answer and the end of sequence.
        stop: Strings that end an answer; they are cut off.

    Returns:
        The score of each row, and what was answered.
    """
    encoded = [encode(row, tokenizer) for row in rows]  # pyrefly: ignore[bad-argument-type]
    # One more than the answer and its end: a model that goes on must be seen to go on.
    limits = [max_new_tokens or len(answer) + 1 for _, answer in encoded]
    produced = greedy(model, tokenizer, [p for p, _ in encoded], limits, batch_size, stop)
    rule = None if match is None else find_match(match)
    scored = []
    for i, ((_, answer), out) in enumerate(zip(encoded, produced, strict=True)):
        wanted = reference(rows[i])
        if rule is None:
            value = float(out.tokens == answer or (out.stopped and out.text == wanted))
        else:
            value = float(rule(out.text, wanted))
        scored.append(RowScore(value, prediction=out.text, reference=wanted))
    named = "exact match" if rule is None else getattr(rule, "__name__", str(match))
    return Scored(scored, f"{named}, greedy")
