"""Texts drawn from a model: one batch as a pure function of weights, openings and seed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_continual.ends import padding_token, up_to_end
from hf_continual.tensors.modes import evaluation_mode
from hf_continual.tensors.reference import most_tokens


@dataclass(frozen=True)
class Sampling:
    """Options for drawing samples.

    Args:
        max_new_tokens: Maximum number of tokens of a sample.
        top_k: Number of likeliest tokens to draw from; 0 draws from all.
        repetition_penalty: Above 1 makes tokens that were written less likely.
        temperature: Divides the logits before a token is drawn; 0 takes the likeliest token.
    """

    max_new_tokens: int
    top_k: int = 20
    repetition_penalty: float = 1.0
    temperature: float = 1.0


@dataclass(frozen=True)
class Answer:
    """What a model wrote after a prompt.

    Args:
        tokens: The new tokens, up to and including the end, if it has one.
        log_probability: Mean log-probability of these tokens, in nats per token, at temperature 1 and without `top_k`.
    """

    tokens: list[int]
    log_probability: float


def sample(
    model: Any,
    tokenizer: Any,
    opening: Sequence[int],
    number: int,
    seed: Sequence[int],
    how: Sampling,
    ends: frozenset[int],
) -> list[list[int]]:
    """Let a model continue an opening several times, as one batch: a pure function of weights, arguments and seed.

    The random states of the run are not touched, and the training mode is restored.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        opening: Sequence[int] to continue.
        number: Number of continuations.
        seed: Numbers that seed the draws.
        how: How they are drawn.
        ends: Tokens that end one.

    Returns:
        The new tokens of each, up to and including its end, if it has one.
    """
    written = _written(model, tokenizer, [list(opening)] * number, seed, how, ends)
    return [up_to_end(tokens, ends) for tokens in written.tolist()]


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    seed: Sequence[int],
    how: Sampling,
    ends: frozenset[int],
) -> list[Answer]:
    """Let a model answer several prompts, as one batch: a pure function of weights, arguments and seed.

    The random states of the run are not touched, and the training mode is restored. Log-probabilities come from the same
    forward passes; they take memory for one more float32 logit per row and word of the vocabulary.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Tokens of each prompt, at least one; padded on the left, so similar lengths cost least.
        seed: Numbers that seed the draws.
        how: How they are drawn; without a repetition penalty.
        ends: Tokens that end an answer.

    Returns:
        One answer per prompt.
    """
    said = _Said()
    written = _written(model, tokenizer, prompts, seed, how, ends, [said])
    values_BT = said.values(written)
    found = []
    for tokens, values in zip(written.tolist(), values_BT.tolist(), strict=True):
        kept = up_to_end(tokens, ends)
        found.append(Answer(kept, sum(values[: len(kept)]) / max(len(kept), 1)))
    return found


class _Said:
    """Records the log-probability of every token that generation chooses; a logits processor that changes nothing."""

    def __init__(self) -> None:
        self._columns: list[Tensor] = []
        self._last_BV: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids[:, -1:])
        self._last_BV = scores.float().log_softmax(-1)
        return scores

    def _take(self, chosen_B1: Tensor) -> None:
        if self._last_BV is not None:
            self._columns.append(self._last_BV.gather(1, chosen_B1))

    def values(self, written_BT: Tensor) -> Tensor:
        """Log-probabilities (B, T) of all tokens written; those after an end mean nothing."""
        self._take(written_BT[:, -1:])
        return torch.cat(self._columns, 1)


def _written(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    seed: Sequence[int],
    how: Sampling,
    ends: frozenset[int],
    processors: list[Any] | None = None,
) -> Tensor:
    """New tokens (B, T) of one batch, as generated."""
    device = model.get_input_embeddings().weight.device
    room, pad, width = most_tokens(model), padding_token(tokenizer), max(map(len, prompts))
    most = how.max_new_tokens if room is None else max(min(how.max_new_tokens, room - width), 1)
    ids_BS = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask_BS = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    # Without sampling, transformers warns about options of sampling.
    drawn = {"temperature": how.temperature, "top_k": how.top_k, "top_p": 1.0} if how.temperature else {}
    with evaluation_mode(model), torch.random.fork_rng(), torch.inference_mode(), warnings.catch_warnings():
        # PEFT says so for each token after a soft prompt; without padding, positions are the same anyway.
        warnings.filterwarnings("ignore", message="Position ids are not supported")
        torch.manual_seed(int(np.random.SeedSequence(list(seed)).generate_state(1)[0]))
        written = model.generate(
            input_ids=ids_BS, attention_mask=mask_BS, do_sample=bool(how.temperature),
            **(drawn or {"temperature": None, "top_k": None, "top_p": None}), repetition_penalty=how.repetition_penalty,
            max_new_tokens=most, pad_token_id=pad, eos_token_id=sorted(ends) or None, logits_processor=processors,
        )  # fmt: skip
    return written[:, width:]
