"""Exact match of answers: by teacher forcing in one forward pass, or by greedy generation.

An answer is right when greedy decoding yields exactly its tokens and then the end of sequence. Teacher forcing
decides that without generating: the greedy output equals the answer if and only if, fed the answer, the model
ranks each of its tokens and the end first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_continual.evaluation.result import Score, mean_of, proportion

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Answers:
    """What a model answers to rows of prompt and completion.

    Args:
        exact: Share of rows answered exactly.
        nll: Mean negative log-likelihood of an answer's token, in nats, averaged over rows; None when generated.
        right: Which rows were answered exactly.
        predictions: Generated answers; empty under teacher forcing.
    """

    exact: Score
    nll: Score | None
    right: list[bool]
    predictions: list[str]


def _encode(row: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens of the prompt, and of the completion with the end of sequence, split as TRL splits them."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    whole = tokenizer(row["prompt"] + row["completion"])["input_ids"]
    shared = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    return whole[:shared], [*whole[shared:], tokenizer.eos_token_id]


def _batches(rows: Dataset, tokenizer: Any, size: int) -> Iterator[list[tuple[list, list]]]:
    encoded = [_encode(row, tokenizer) for row in rows]  # pyrefly: ignore[bad-argument-type]
    for start in range(0, len(encoded), size):
        yield encoded[start : start + size]


@torch.inference_mode()
def teacher_forced(model: Any, tokenizer: Any, rows: Dataset, batch_size: int = 32) -> Answers:
    """Exact match and answer likelihood from one forward pass per batch.

    Only the answers' positions go through the language-model head.

    Args:
        model: A causal language model, with or without adapters; its training mode is restored.
        tokenizer: Its tokenizer, with an end-of-sequence token.
        rows: ``{"prompt", "completion"}``, as strings.
        batch_size: Rows per forward pass.

    Returns:
        Scores and which rows were right.
    """
    training, device = model.training, model.get_input_embeddings().weight.device
    model.eval()
    right: list[bool] = []
    losses: list[float] = []
    for batch in _batches(rows, tokenizer, batch_size):
        width = max(len(p) + len(a) for p, a in batch)
        ids = torch.full((len(batch), width), tokenizer.eos_token_id)
        mask = torch.zeros_like(ids)
        for i, (prompt, answer) in enumerate(batch):
            ids[i, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
            mask[i, : len(prompt) + len(answer)] = 1
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        hidden_BSD = base.base_model(
            input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
        ).last_hidden_state
        # Position t predicts token t + 1, so an answer is predicted from the last token of its prompt on.
        states = [hidden_BSD[i, len(p) - 1 : len(p) + len(a) - 1] for i, (p, a) in enumerate(batch)]
        logits = base.get_output_embeddings()(torch.cat(states)).float()
        gold = torch.tensor([token for _, a in batch for token in a], device=device)
        sizes = [len(a) for _, a in batch]
        nll = torch.nn.functional.cross_entropy(logits, gold, reduction="none").split(sizes)
        hits = (logits.argmax(-1) == gold).split(sizes)
        losses += torch.stack([x.mean() for x in nll]).tolist()
        right += torch.stack([x.all() for x in hits]).tolist()
    model.train(training)
    return Answers(
        proportion(sum(right), len(right), "exact match, teacher forced"),
        mean_of(losses, "answer NLL per token"),
        right,
        [],
    )


@torch.inference_mode()
def generated(
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
) -> Answers:
    """Exact match by batched greedy generation, left padded, until the end of sequence.

    Args:
        model: A causal language model; its training mode is restored.
        tokenizer: Its tokenizer.
        rows: ``{"prompt", "completion"}``, as strings.
        batch_size: Rows per batch.
        max_new_tokens: Limit; by default one more than the longest answer.

    Returns:
        Scores, which rows were right, and the answers.
    """
    training, device = model.training, model.get_input_embeddings().weight.device
    model.eval()
    right: list[bool] = []
    predictions: list[str] = []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for batch in _batches(rows, tokenizer, batch_size):
        width = max(len(p) for p, _ in batch)
        ids = torch.tensor([[pad] * (width - len(p)) + p for p, _ in batch], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in batch], device=device)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens or max(len(a) for _, a in batch) + 1,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )
        for (_, answer), produced in zip(batch, out[:, width:].tolist(), strict=True):
            end = produced.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in produced else len(produced)
            right.append(produced[:end] == answer)
            predictions.append(tokenizer.decode(_without_end(produced[:end], tokenizer.eos_token_id)))
    model.train(training)
    return Answers(proportion(sum(right), len(right), "exact match, greedy"), None, right, predictions)


def _without_end(tokens: Sequence[int], eos: int) -> list[int]:
    return [token for token in tokens if token != eos]
