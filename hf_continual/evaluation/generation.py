"""Batched greedy generation that gives each row the answer it would give alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from hf_continual.evaluation.prompts import batches_by_length, evaluating


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
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
    found: dict[int, Output] = {}
    with evaluating(model) as device, _plain_settings(model):
        for picked in batches_by_length(prompts, [len(p) for p in prompts], batch_size):
            width = max(len(prompts[i]) for i in picked)
            ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in picked], device=device)
            mask = torch.tensor(
                [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in picked], device=device
            )
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max(limits[i] for i in picked),
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=eos,
                stopping_criteria=StoppingCriteriaList([_Stop(tokenizer, stop, width)]) if stop else None,
            )
            for i, new in zip(picked, out[:, width:].tolist(), strict=True):
                found[i] = _output(new[: limits[i]], tokenizer, stop)
    return [found[i] for i in range(len(prompts))]


class _Stop(StoppingCriteria):
    """Ends a row once its text holds a stop string; transformers' own fails on tokenizers of whole words."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], width: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        texts = self.tokenizer.batch_decode(input_ids[:, self.width :].tolist())
        return torch.tensor([any(s in text for s in self.stop) for text in texts], device=input_ids.device)


def _output(new: list[int], tokenizer: Any, stop: Sequence[str]) -> Output:
    eos = tokenizer.eos_token_id
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
