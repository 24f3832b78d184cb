"""Batched greedy generation that gives each row the same answer as on its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from hf_continual.ends import added_tokens, end_tokens, padding_token
from hf_continual.evaluation.prompts import NOT_NUMBERS, batches_by_length, decoder, evaluating
from hf_continual.inference.kinds import keep_rows


@dataclass(frozen=True)
class Output:
    """A generated answer.

    Args:
        tokens: Its tokens, with the end if the model ended it.
        text: As text, without special tokens and without the stop string.
        stopped: Whether a stop string ended it.
    """

    tokens: list[int]
    text: str
    stopped: bool


@dataclass(frozen=True)
class Until:
    """The conditions that end an answer.

    Args:
        ends: Tokens that end an answer.
        stop: Strings that end an answer.
        tokenizer: The model's.
    """

    ends: frozenset[int]
    stop: Sequence[str]
    tokenizer: Any

    def stopped(self, tokens: Sequence[int]) -> bool:
        """Whether the tokens' text, special tokens included, contains a stop string."""
        return bool(self.stop) and any(s in self.tokenizer.decode(tokens) for s in self.stop)

    def ended(self, tokens: Sequence[int], limit: int) -> bool:
        """Whether an answer is over."""
        return tokens[-1] in self.ends or len(tokens) >= limit or self.stopped(tokens)


def stop_strings(stop: str | Sequence[str]) -> list[str]:
    """Stop strings as a list; a single one may be given as a string.

    Args:
        stop: Strings that end an answer.

    Returns:
        The same, as a list.

    Raises:
        ValueError: If one is empty.
    """
    several = [stop] if isinstance(stop, str) else list(stop)
    if "" in several:
        raise ValueError("stop contains an empty string, which would end every answer before it begins. Leave it out.")
    return several


def cut_at(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """A text up to the first stop string, and whether there was one."""
    places = [text.index(s) for s in stop if s in text]
    return (text[: min(places)], True) if places else (text, False)


def greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    batch_size: int = 32,
    stop: Sequence[str] = (),
    ends: Collection[int] | None = None,
) -> list[Output]:
    """Continue prompts greedily, in batches of similar length, padded on the left.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Tokens of each prompt.
        limits: Maximum number of new tokens for each prompt.
        batch_size: Prompts per batch.
        stop: Strings that end an answer.
        ends: Tokens that end an answer; None: the tokenizer's end, and those of the model's generation config.

    Returns:
        One output per prompt, in their order.

    Raises:
        ValueError: If the model's logits are not numbers.
    """
    until = Until(frozenset(end_tokens(model, tokenizer) if ends is None else ends), stop_strings(stop), tokenizer)
    found: dict[int, list[int]] = {}
    with evaluating(model) as device:
        for picked in batches_by_length(prompts, [len(p) for p in prompts], batch_size):
            batch, most = [prompts[i] for i in picked], [limits[i] for i in picked]
            for i, tokens in zip(picked, _continue(model, batch, most, until, device), strict=True):
                found[i] = tokens
    hidden = added_tokens(tokenizer).special | until.ends
    return [_output(found[i], until, hidden) for i in range(len(prompts))]


def rows_are_apart(cache: Any) -> bool:
    """Whether a cache holds keys and values of each token only, so that rows can be selected and continued freely.

    The states of recurrent and convolutional layers are not of this kind.
    """
    return type(cache) is DynamicCache and all(
        isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin)
        for layer in cache.layers
    )


def _continue(
    model: Any, prompts: list[list[int]], limits: list[int], until: Until, device: torch.device
) -> list[list[int]]:
    """New tokens of one batch. Finished rows leave the batch, so that one long answer does not delay the others."""
    body, head = decoder(model)
    pad, width = padding_token(until.tokenizer), max(map(len, prompts))
    ids_BS = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask_BS = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    places_BS = (mask_BS.cumsum(1) - 1).clamp(min=0)
    new: list[list[int]] = [[] for _ in prompts]
    rows, cache = list(range(len(prompts))), None
    while True:
        out = body(
            input_ids=ids_BS, attention_mask=mask_BS, position_ids=places_BS, past_key_values=cache, use_cache=True
        )
        cache = out.get("past_key_values")
        if not rows_are_apart(cache):
            return _by_length(model, prompts, limits, until, device)
        chosen_B = _first(head(out.last_hidden_state[:, -1]))
        for row, token in zip(rows, chosen_B.tolist(), strict=True):
            if row >= 0:
                new[row].append(token)
        if any(tokens[-1] < 0 for tokens in new):
            raise ValueError(NOT_NUMBERS)
        alive = [k for k, row in enumerate(rows) if row >= 0 and not until.ended(new[row], limits[row])]
        if not alive:
            return new
        rows = [row if k in set(alive) else -1 for k, row in enumerate(rows)]
        if len(alive) <= 0.75 * len(rows):
            kept = torch.tensor(alive, device=device)
            cache.batch_select_indices(kept)  # pyrefly: ignore[missing-attribute]
            keep_rows(model, kept)
            rows = [rows[k] for k in alive]
            mask_BS, places_BS, chosen_B = mask_BS[kept], places_BS[kept], chosen_B[kept]
        ids_BS, places_BS = chosen_B.clamp(min=0)[:, None], places_BS[:, -1:] + 1
        mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(rows), 1)], dim=1)


def _first(logits_BV: torch.Tensor) -> torch.Tensor:
    """The most likely tokens; -1 where logits are not numbers, so that no extra device sync is needed."""
    best_B, chosen_B = logits_BV.max(-1)
    return torch.where(best_B.isnan(), -1, chosen_B)


def _by_length(
    model: Any, prompts: list[list[int]], limits: list[int], until: Until, device: torch.device
) -> list[list[int]]:
    """The same with transformers' generate, one prompt length at a time: padding may enter a recurrent state."""
    found: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for width, group in groupby(order, key=lambda i: len(prompts[i])):
        picked = list(group)
        ids = torch.tensor([prompts[i] for i in picked], device=device)
        stopping = StoppingCriteriaList([_Stop(until, width)]) if until.stop else None
        with _plain_settings(model):
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max(limits[i] for i in picked),
                do_sample=False, pad_token_id=padding_token(until.tokenizer), eos_token_id=sorted(until.ends) or None,
                stopping_criteria=stopping, logits_processor=LogitsProcessorList([_numbers]),
            )  # fmt: skip
        found |= {i: tokens[: limits[i]] for i, tokens in zip(picked, out[:, width:].tolist(), strict=True)}
    return [found[i] for i in range(len(prompts))]


def _numbers(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    if bool(scores.isnan().any()):
        raise ValueError(NOT_NUMBERS)
    return scores


class _Stop(StoppingCriteria):
    """Ends a row once its text contains a stop string; transformers' own fails on tokenizers of whole words."""

    def __init__(self, until: Until, width: int) -> None:
        self.until, self.width = until, width

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        over = [self.until.stopped(tokens) for tokens in input_ids[:, self.width :].tolist()]
        return torch.tensor(over, device=input_ids.device)


def _output(new: list[int], until: Until, hidden: frozenset[int]) -> Output:
    """Cut at the first end; the text is also cut at a stop string."""
    over = next((i for i, token in enumerate(new) if token in until.ends), None)
    tokens = new if over is None else new[: over + 1]
    text, _ = cut_at(until.tokenizer.decode([t for t in tokens if t not in hidden]), until.stop)
    return Output(tokens, text, until.stopped(tokens if over is None else tokens[:-1]))


@contextmanager
def _plain_settings(model: Any) -> Iterator[None]:
    """Greedy decoding without what a checkpoint's generation config may add, such as a repetition penalty."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    before = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = before
