"""Log-likelihoods of answers given as tokens; the shared part of a prompt's answers is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hf_continual.ends import padding_token
from hf_continual.evaluation.generation import rows_are_apart
from hf_continual.evaluation.prompts import NOT_NUMBERS, batches_by_length, decoder, evaluating
from hf_continual.inference.kinds import asked, keep_rows

if TYPE_CHECKING:
    from torch import Tensor

Pair = tuple[list[int], list[int]]  # tokens of a prompt and of an answer


def log_likelihoods(
    model: Any, tokenizer: Any, pairs: Sequence[Sequence[Pair]], batch_size: int = 16, share_prompt: bool = True
) -> list[list[tuple[float, int]]]:
    """Log-likelihood of answers after their prompts, given as tokens.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        pairs: For each row, the tokens of a prompt and an answer for each choice.
        batch_size: Rows per batch.
        share_prompt: Whether to compute the shared prefix of a row's choices once. Models whose cache cannot be
            copied by rows always compute whole sequences.

    Returns:
        For each row and choice, the sum of the answer's log-probabilities in nats, and its number of tokens.

    Raises:
        ValueError: If a prompt or an answer has no token, or the model's logits are not numbers.
    """
    for i, offered in enumerate(pairs):
        if not all(prompt and answer for prompt, answer in offered):
            raise ValueError(f"row {i} has a prompt or a choice without tokens, which has no likelihood.")
    found: dict[int, list[tuple[float, int]]] = {}
    with evaluating(model) as device:
        for picked in batches_by_length(pairs, [max(len(p) for p, _ in s) for s in pairs], batch_size):
            prefixes, suffixes, owners = [], [], []
            for place, i in enumerate(picked):
                wholes = [prompt + answer for prompt, answer in pairs[i]]
                shared = min(min(len(prompt) for prompt, _ in pairs[i]), min(map(len, wholes)) - 1)
                while len({tuple(whole[:shared]) for whole in wholes}) > 1:
                    shared -= 1
                prefixes.append(wholes[0][:shared])
                suffixes += [
                    (whole[shared:], len(prompt) - shared) for whole, (prompt, _) in zip(wholes, pairs[i], strict=True)
                ]
                owners += [place] * len(wholes)
            values = _behind(model, prefixes, suffixes, owners, padding_token(tokenizer), device, share_prompt)
            for place, i in enumerate(picked):
                found[i] = [v for v, owner in zip(values, owners, strict=True) if owner == place]
    return [found[i] for i in range(len(pairs))]


def _behind(
    model: Any,
    prefixes: list[list[int]],
    suffixes: list[tuple[list[int], int]],
    owners: list[int],
    pad: int,
    device: torch.device,
    share: bool,
) -> list[tuple[float, int]]:
    """Log-likelihood of suffixes after the prefixes they belong to; the first tokens of a suffix may not count."""
    if not share or not all(prefixes):
        return _whole(model, prefixes, suffixes, owners, pad, device)
    body, head = decoder(model)
    width, longest = max(map(len, prefixes)), max(len(s) for s, _ in suffixes)
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prefixes], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prefixes], device=device)
    owner = torch.tensor(owners, device=device)
    tail = torch.tensor([s + [pad] * (longest - len(s)) for s, _ in suffixes], device=device)
    tail_mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s, _ in suffixes], device=device)
    whole_mask = torch.cat([mask[owner], tail_mask], dim=1)
    places = (whole_mask.cumsum(1) - 1).clamp(min=0)
    first = body(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True)
    cache = first.get("past_key_values")
    if not rows_are_apart(cache):
        return _whole(model, prefixes, suffixes, owners, pad, device)
    cache.batch_select_indices(owner)
    keep_rows(model, owner)
    rest = body(
        input_ids=tail, attention_mask=whole_mask, position_ids=places[:, width:], past_key_values=cache, use_cache=True
    ).last_hidden_state
    hidden_BSD = torch.cat([first.last_hidden_state[owner, -1:], rest[:, :-1]], dim=1)
    return _sums(head, hidden_BSD, tail, suffixes)


def _whole(
    model: Any,
    prefixes: list[list[int]],
    suffixes: list[tuple[list[int], int]],
    owners: list[int],
    pad: int,
    device: torch.device,
) -> list[tuple[float, int]]:
    """The same from whole sequences, padded on the right, where the padding affects no state."""
    body, head = decoder(model)
    wholes = [prefixes[owner] + suffix for owner, (suffix, _) in zip(owners, suffixes, strict=True)]
    width = max(map(len, wholes))
    ids = torch.tensor([w + [pad] * (width - len(w)) for w in wholes], device=device)
    mask = torch.tensor([[1] * len(w) + [0] * (width - len(w)) for w in wholes], device=device)
    sizes = torch.tensor([[len(prefixes[owner])] for owner in owners], device=device)
    with asked(model, torch.arange(width, device=device) < sizes):
        hidden_BSD = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    # Position t predicts token t + 1.
    counted = [
        (whole[1:], len(prefixes[owner]) + skipped - 1)
        for whole, owner, (_, skipped) in zip(wholes, owners, suffixes, strict=True)
    ]
    return _sums(head, hidden_BSD[:, :-1], ids[:, 1:], counted)


def _sums(
    head: Any, hidden_BSD: Tensor, tail_BS: Tensor, suffixes: list[tuple[list[int], int]]
) -> list[tuple[float, int]]:
    counted = torch.zeros_like(tail_BS, dtype=torch.bool)
    for i, (suffix, skipped) in enumerate(suffixes):
        counted[i, skipped : len(suffix)] = True
    loss = torch.nn.functional.cross_entropy(head(hidden_BSD[counted]).float(), tail_BS[counted], reduction="none")
    if bool(loss.isnan().any()):
        raise ValueError(NOT_NUMBERS)
    sizes = counted.sum(1).tolist()
    return [(-float(part.double().sum()), n) for part, n in zip(loss.split(sizes), sizes, strict=True)]
