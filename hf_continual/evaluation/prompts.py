"""Rows of prompt and completion as tokens, split where TRL splits them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def encode(row: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens of a row's prompt, and of its completion up to and with the end of sequence.

    Args:
        row: ``{"prompt", "completion"}``, two strings or two lists of messages.
        tokenizer: With an end-of-sequence token; with a chat template where the row is a conversation.

    Returns:
        The prompt's tokens, at least one, and the answer's.

    Raises:
        ValueError: If the row has no prompt or no completion, or the prompt has no token.
    """
    if row.get("prompt") is None or row.get("completion") is None:
        raise ValueError(
            f"a row to score needs 'prompt' and 'completion', this one has {sorted(row)}. Map its columns, or name the "
            f"columns that hold them."
        )
    if isinstance(row["prompt"], str):
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        end = True
    else:
        prompt = _chat(tokenizer, row["prompt"], True)
        whole = _chat(tokenizer, [*row["prompt"], *row["completion"]], False)
        end = tokenizer.eos_token_id not in whole[len(prompt) :]
    shared = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    if shared == 0:
        raise ValueError(
            f"the prompt {row['prompt']!r} has no token before the answer; a model cannot begin from nothing."
        )
    answer = [*whole[shared:], tokenizer.eos_token_id] if end else whole[shared:]
    # A template may add a line break behind the end of sequence; generation stops at the end.
    return whole[:shared], answer[: answer.index(tokenizer.eos_token_id) + 1]


def _chat(tokenizer: Any, messages: Sequence[dict[str, str]], prompt: bool) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=True, return_dict=False)


def reference(row: dict[str, Any]) -> str:
    """A row's completion as text."""
    answer = row["completion"]
    return answer if isinstance(answer, str) else "".join(m["content"] for m in answer)


def prompt_hash(row: dict[str, Any]) -> str:
    """16 hexadecimal digits that tell prompts apart without storing them."""
    shown = row.get("prompt", row.get("text", row))
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
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    head, config = base.get_output_embeddings(), base.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)

    def logits(hidden: Tensor) -> Tensor:
        found = head(hidden)
        found = found if scale == 1.0 else found * scale
        return found if cap is None else cap * torch.tanh(found / cap)

    return base.base_model, logits
