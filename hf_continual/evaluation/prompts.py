"""Rows of prompt and completion as tokens, split where TRL splits them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_continual.ends import added_tokens, end_tokens
from hf_continual.evaluation.frame import frame_of
from hf_continual.evaluation.trained import as_pair, trained_tokens
from hf_continual.tensors.head import logits_function, plain_model

Item = TypeVar("Item")

NOT_NUMBERS = (
    "the model's logits are not numbers (NaN), so it cannot be scored. Its weights are broken, or float16 overflowed: look "
    "at its training loss, or load it with dtype bfloat16 or float32."
)


def encode(row: dict[str, Any], tokenizer: Any, ends: Collection[int] = ()) -> tuple[list[int], list[int]]:
    """Tokens of a row's prompt, and of its completion up to and with the token that ends it.

    Args:
        row: ``{"prompt", "completion"}``, two strings or two lists of messages; or ``{"messages"}``.
        tokenizer: With an end-of-sequence token, or with a chat template where the row is a conversation.
        ends: Further tokens that end an answer, such as those of a model's generation config
            (`hf_continual.ends.end_tokens`); the tokenizer's own and the chat template's are known.

    Returns:
        The prompt's tokens, at least one, and the answer's, both as SFTTrainer trains them.

    Raises:
        ValueError: If the row has no prompt or no completion, or the prompt has no token.
    """
    prompt, answer = trained_tokens(row, tokenizer)
    if not prompt:
        raise ValueError(
            f"the prompt {as_pair(row)['prompt']!r} has no token before the answer; a model cannot begin from nothing."
        )
    known = {*ends, *end_tokens(None, tokenizer)}
    end = frame_of(row, tokenizer, known, added_tokens(tokenizer)).end
    return prompt, up_to_end(answer, known if end is None else known | {end})


def up_to_end(answer: list[int], ends: Collection[int]) -> list[int]:
    """An answer up to and with its first end: a template may add a line break after it, which nobody generates."""
    stop = next((i for i, token in enumerate(answer) if token in ends), len(answer))
    return answer[: stop + 1]


def prompt_hash(row: dict[str, Any]) -> str:
    """16 hexadecimal digits that tell prompts apart without storing them."""
    shown = next((row[k] for k in ("prompt", "messages", "text") if row.get(k) is not None), row)
    text = shown if isinstance(shown, str) else json.dumps(shown, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def batches_by_length(items: Sequence[Item], lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of rows of like length, longest first, so that little is padding and memory peaks early."""
    order = sorted(range(len(items)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


@contextmanager
def evaluating(model: Any) -> Iterator[torch.device]:
    """Evaluation mode without gradients; the training mode is restored. Yields the device of the inputs."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield model.get_input_embeddings().weight.device
    finally:
        model.train(training)


def decoder(model: Any) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """The parts of a causal model with or without adapters, so that only chosen positions go through its head.

    Args:
        model: A causal language model.

    Returns:
        The part below the head, and a function from its hidden states to logits, with the scaling and capping
        that some families put behind the head (Cohere, Granite, Gemma 2 and later).
    """
    return plain_model(model).base_model, logits_function(model)
