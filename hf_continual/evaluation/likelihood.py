"""Choosing among given answers by their likelihood, the shared prompt computed once.

With log p(c) the sum of the log-probabilities of the tokens of choice c after the prompt, the chosen answer is
argmax log p(c) ("sum", lm-eval's acc), argmax log p(c) / characters ("characters", lm-eval's acc_norm), or
argmax log p(c) / tokens ("tokens").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import DynamicCache

from hf_continual.evaluation.exact_match import teacher_forced
from hf_continual.evaluation.prompts import batches_by_length, decoder, encode, evaluating, reference
from hf_continual.evaluation.result import RowScore, Scored

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

Normalise = Literal["sum", "characters", "tokens"]


def label_likelihood(
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    labels: Sequence[str] | None = None,
    normalise: Normalise = "sum",
    batch_size: int = 16,
) -> Scored:
    """Classify by the most likely label.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        rows: ``{"prompt", "completion"}``; the completion is a label.
        labels: All labels as completions, with the space before them; by default those that occur in the rows.
        normalise: How log-likelihoods of different lengths are compared.
        batch_size: Prompts per batch.

    Returns:
        1 for rows whose label is the most likely.

    Raises:
        ValueError: If a row's completion is no label.
    """
    known = sorted({reference(row) for row in rows}) if labels is None else list(labels)  # pyrefly: ignore
    for row in rows:
        if reference(row) not in known:  # pyrefly: ignore[bad-argument-type]
            raise ValueError(f"the answer {reference(row)!r} is none of the labels {known}; mind the space before it.")  # pyrefly: ignore
    prompts = [row["prompt"] for row in rows]  # pyrefly: ignore[bad-index]
    values = choice_log_likelihoods(model, tokenizer, prompts, [known] * len(prompts), batch_size)
    scored = []
    for row, of_row in zip(rows, values, strict=True):
        best = known[_best(of_row, known, normalise)]
        scored.append(RowScore(float(best == reference(row)), prediction=best, reference=reference(row)))  # pyrefly: ignore
    return Scored(scored, f"most likely of {len(known)} labels, by {normalise}")


def multiple_choice(
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    normalise: Normalise = "characters",
    batch_size: int = 16,
) -> Scored:
    """Multiple choice as lm-eval scores it.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        rows: ``{"context", "choices", "answer"}``; `answer` is the index of the right choice. A choice is put
            behind the context and a space.
        normalise: "characters" is lm-eval's acc_norm, "sum" its acc.
        batch_size: Contexts per batch.

    Returns:
        1 for rows whose right choice is the most likely.

    Raises:
        ValueError: If a column is missing.
    """
    if missing := {"context", "choices", "answer"} - set(rows.column_names):
        raise ValueError(f"multiple choice needs the column {sorted(missing)[0]!r}; the rows have {rows.column_names}.")
    choices = [[" " + c.strip() for c in row["choices"]] for row in rows]  # pyrefly: ignore[bad-index]
    prompts = [row["context"].rstrip() for row in rows]  # pyrefly: ignore[bad-index]
    values = choice_log_likelihoods(model, tokenizer, prompts, choices, batch_size)
    scored = []
    for row, of_row, offered in zip(rows, values, choices, strict=True):
        best = _best(of_row, [c[1:] for c in offered], normalise)
        right = int(row["answer"])  # pyrefly: ignore[bad-index]
        scored.append(RowScore(float(best == right), prediction=offered[best][1:], reference=offered[right][1:]))
    return Scored(scored, f"multiple choice, {'acc_norm' if normalise == 'characters' else 'acc'} by {normalise}")


def answer_nll(model: Any, tokenizer: Any, rows: Dataset, batch_size: int = 32) -> Scored:
    """Negative log-likelihood of the right answer's token, in nats; lower is better.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        rows: ``{"prompt", "completion"}``.
        batch_size: Rows per forward pass.

    Returns:
        The mean over an answer's tokens and its end, per row.
    """
    forced = teacher_forced(model, tokenizer, rows, batch_size)
    losses = [RowScore(r.also["nll"], prediction=r.prediction, reference=r.reference, also=r.also) for r in forced.rows]
    return Scored(losses, "answer NLL per token", lower_is_better=True)


def _best(values: Sequence[tuple[float, int]], choices: Sequence[str], normalise: Normalise) -> int:
    sizes = {
        "sum": [1.0] * len(choices),
        "characters": [float(max(len(c), 1)) for c in choices],
        "tokens": [float(n) for _, n in values],
    }
    if normalise not in sizes:
        raise ValueError(f"normalise={normalise!r} must be one of {', '.join(sizes)}.")
    ratios = [v / size for (v, _), size in zip(values, sizes[normalise], strict=True)]
    return max(range(len(ratios)), key=ratios.__getitem__)


def choice_log_likelihoods(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    choices: Sequence[Sequence[str]],
    batch_size: int = 16,
    share_prompt: bool = True,
) -> list[list[tuple[float, int]]]:
    """Log-likelihood of each choice behind its prompt, without an end of sequence.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: One per row.
        choices: The choices of each row, as text with the space before them.
        batch_size: Prompts per batch.
        share_prompt: Whether a prompt is computed once for all its choices. Models whose cache cannot be
            copied by rows are computed whole in any case.

    Returns:
        Per row and choice the sum of the log-probabilities in nats, and the number of tokens.
    """
    split = [
        [encode({"prompt": p, "completion": c}, tokenizer) for c in offered]
        for p, offered in zip(prompts, choices, strict=True)
    ]
    found: dict[int, list[tuple[float, int]]] = {}
    with evaluating(model) as device:
        for picked in batches_by_length(split, [max(len(p) for p, _ in s) for s in split], batch_size):
            prefixes, suffixes, owners = [], [], []
            for place, i in enumerate(picked):
                # A tokenizer may join the prompt's last letters with a choice: share what is equal in all of them.
                wholes = [prompt + answer[:-1] for prompt, answer in split[i]]
                shared = min(min(len(prompt) for prompt, _ in split[i]), min(map(len, wholes)) - 1)
                while len({tuple(whole[:shared]) for whole in wholes}) > 1:
                    shared -= 1
                prefixes.append(wholes[0][:shared])
                suffixes += [
                    (whole[shared:], len(prompt) - shared) for whole, (prompt, _) in zip(wholes, split[i], strict=True)
                ]
                owners += [place] * len(wholes)
            values = _behind(model, prefixes, suffixes, owners, tokenizer.eos_token_id, device, share_prompt)
            for place, i in enumerate(picked):
                found[i] = [v for v, owner in zip(values, owners, strict=True) if owner == place]
    return [found[i] for i in range(len(split))]


def _behind(
    model: Any,
    prefixes: list[list[int]],
    suffixes: list[tuple[list[int], int]],
    owners: list[int],
    pad: int,
    device: torch.device,
    share: bool,
) -> list[tuple[float, int]]:
    """Log-likelihood of suffixes behind the prefixes that own them; the first tokens of a suffix may not count."""
    body, head = decoder(model)
    width, longest = max(map(len, prefixes)), max(len(s) for s, _ in suffixes)
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prefixes], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prefixes], device=device)
    owner = torch.tensor(owners, device=device)
    tail = torch.tensor([s + [pad] * (longest - len(s)) for s, _ in suffixes], device=device)
    tail_mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s, _ in suffixes], device=device)
    whole_mask = torch.cat([mask[owner], tail_mask], dim=1)
    places = (whole_mask.cumsum(1) - 1).clamp(min=0)
    first = (
        body(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True)
        if share
        else None
    )
    if first is not None and isinstance(first.get("past_key_values"), DynamicCache):
        first.past_key_values.batch_select_indices(owner)
        rest = body(
            input_ids=tail, attention_mask=whole_mask, position_ids=places[:, width:],
            past_key_values=first.past_key_values, use_cache=True,
        ).last_hidden_state  # fmt: skip
        hidden_BSD = torch.cat([first.last_hidden_state[owner, -1:], rest[:, :-1]], dim=1)
    else:
        whole = torch.cat([ids[owner], tail], dim=1)
        hidden_BSD = body(
            input_ids=whole, attention_mask=whole_mask, position_ids=places, use_cache=False
        ).last_hidden_state[:, width - 1 : -1]
    return _sums(head, hidden_BSD, tail, suffixes)


def _sums(
    head: Any, hidden_BSD: Tensor, tail_BS: Tensor, suffixes: list[tuple[list[int], int]]
) -> list[tuple[float, int]]:
    counted = torch.zeros_like(tail_BS, dtype=torch.bool)
    for i, (suffix, skipped) in enumerate(suffixes):
        counted[i, skipped : len(suffix)] = True
    loss = torch.nn.functional.cross_entropy(head(hidden_BSD[counted]).float(), tail_BS[counted], reduction="none")
    sizes = counted.sum(1).tolist()
    return [(-float(part.double().sum()), n) for part, n in zip(loss.split(sizes), sizes, strict=True)]
