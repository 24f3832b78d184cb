"""Samples drawn from a model: one batch as a pure function of weights, opening and seed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

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
    """

    max_new_tokens: int
    top_k: int = 20
    repetition_penalty: float = 1.0


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
    device = model.get_input_embeddings().weight.device
    room, pad = most_tokens(model), padding_token(tokenizer)
    most = how.max_new_tokens if room is None else max(min(how.max_new_tokens, room - len(opening)), 1)
    ids = torch.tensor([list(opening)] * number, device=device)
    with evaluation_mode(model), torch.random.fork_rng(), torch.inference_mode(), warnings.catch_warnings():
        # PEFT says so for each token after a soft prompt; without padding, positions are the same anyway.
        warnings.filterwarnings("ignore", message="Position ids are not supported")
        torch.manual_seed(int(np.random.SeedSequence(list(seed)).generate_state(1)[0]))
        written = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=how.top_k,
            top_p=1.0, repetition_penalty=how.repetition_penalty, max_new_tokens=most, pad_token_id=pad,
            eos_token_id=sorted(ends) or None,
        )  # fmt: skip
    return [up_to_end(tokens, ends) for tokens in written[:, len(opening) :].tolist()]
