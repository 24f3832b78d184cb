"""Batched greedy generation that gives each row the answer it would give alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from hf_continual.evaluation.prompts import batches_by_length, decoder, evaluating


@dataclass(frozen=True)
class Output:
    """A generated answer.

    Args:
        tokens: Its tokens, with the end of sequence where the model ended it.
        text: As text, without the end of sequence and without the stop string.
        stopped: Whether a stop string ended it.
    """

    tokens: list[int]
    text: str
    stopped: bool


def greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    batch_size: int = 32,
    stop: Sequence[str] = (),
) -> list[Output]:
    """Continue prompts greedily, in batches of like length padded on the left.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Tokens of each prompt.
        limits: Most new tokens of each prompt.
        batch_size: Prompts per batch.
        stop: Strings that end an answer.

    Returns:
        One output per prompt, in their order.
    """
    eos = tokenizer.eos_token_id
    found: dict[int, list[int]] = {}
    with evaluating(model) as device:
        for picked in batches_by_length(prompts, [len(p) for p in prompts], batch_size):
            batch, most = [prompts[i] for i in picked], [limits[i] for i in picked]
            for i, tokens in zip(picked, _continue(model, tokenizer, batch, most, stop, device), strict=True):
                found[i] = tokens
    return [_output(found[i], tokenizer, stop, eos) for i in range(len(prompts))]


def _continue(
    model: Any, tokenizer: Any, prompts: list[list[int]], limits: list[int], stop: Sequence[str], device: torch.device
) -> list[list[int]]:
    """New tokens of one batch. Rows that have ended leave it, so that one long answer does not hold up the others."""
    body, head = decoder(model)
    eos = tokenizer.eos_token_id
    width = max(map(len, prompts))
    ids_BS = torch.tensor([[eos] * (width - len(p)) + p for p in prompts], device=device)
    mask_BS = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    places_BS = (mask_BS.cumsum(1) - 1).clamp(min=0)
    new: list[list[int]] = [[] for _ in prompts]
    rows, cache = list(range(len(prompts))), None
    while True:
        out = body(
            input_ids=ids_BS, attention_mask=mask_BS, position_ids=places_BS, past_key_values=cache, use_cache=True
        )
        cache = out.get("past_key_values")
        if not isinstance(cache, DynamicCache):
            return _generate(model, tokenizer, prompts, limits, stop, device)
        chosen_B = head(out.last_hidden_state[:, -1]).argmax(-1)
        for row, token in zip(rows, chosen_B.tolist(), strict=True):
            if row >= 0:
                new[row].append(token)
        alive = [k for k, row in enumerate(rows) if row >= 0 and not _ended(new[row], limits[row], tokenizer, stop)]
        if not alive:
            return new
        rows = [row if k in set(alive) else -1 for k, row in enumerate(rows)]
        if len(alive) <= 0.75 * len(rows):
            kept = torch.tensor(alive, device=device)
            cache.batch_select_indices(kept)
            rows, mask_BS, places_BS, chosen_B = (
                [rows[k] for k in alive],
                mask_BS[kept],
                places_BS[kept],
                chosen_B[kept],
            )
        ids_BS, places_BS = chosen_B[:, None], places_BS[:, -1:] + 1
        mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(rows), 1)], dim=1)


def _ended(tokens: list[int], limit: int, tokenizer: Any, stop: Sequence[str]) -> bool:
    if tokens[-1] == tokenizer.eos_token_id or len(tokens) >= limit:
        return True
    return bool(stop) and any(s in tokenizer.decode(tokens) for s in stop)


def _generate(
    model: Any, tokenizer: Any, prompts: list[list[int]], limits: list[int], stop: Sequence[str], device: torch.device
) -> list[list[int]]:
    """The same through transformers, for models whose cache is not one row per answer (state-space models)."""
    eos, width = tokenizer.eos_token_id, max(map(len, prompts))
    ids = torch.tensor([[eos] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    with _plain_settings(model):
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max(limits), do_sample=False, pad_token_id=eos,
            eos_token_id=eos, stopping_criteria=StoppingCriteriaList([_Stop(tokenizer, stop, width)]) if stop else None,
        )  # fmt: skip
    return [tokens[:limit] for tokens, limit in zip(out[:, width:].tolist(), limits, strict=True)]


class _Stop(StoppingCriteria):
    """Ends a row once its text holds a stop string; transformers' own fails on tokenizers of whole words."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], width: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        texts = self.tokenizer.batch_decode(input_ids[:, self.width :].tolist())
        return torch.tensor([any(s in text for s in self.stop) for text in texts], device=input_ids.device)


def _output(new: list[int], tokenizer: Any, stop: Sequence[str], eos: int) -> Output:
    tokens = new[: new.index(eos) + 1] if eos in new else new
    text = tokenizer.decode([t for t in tokens if t != eos])
    ends = [text.index(s) for s in stop if s in text]
    return Output(tokens, text[: min(ends)] if ends else text, bool(ends))


@contextmanager
def _plain_settings(model: Any) -> Iterator[None]:
    """Greedy without what a checkpoint's generation config may add, such as a repetition penalty."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    before = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = before
