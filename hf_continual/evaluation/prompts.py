"""Rows of prompt and completion as tokens, split where TRL splits them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_continual.ends import added_tokens, end_tokens, up_to_end
from hf_continual.evaluation.frame import frame_of
from hf_continual.evaluation.trained import as_pair, message_text, trained_tokens
from hf_continual.progress import counting
from hf_continual.tensors.head import logits_function, plain_model
from hf_continual.tensors.modes import evaluation_mode
from hf_continual.tensors.reference import virtual_tokens

Item = TypeVar("Item")

NOT_NUMBERS = (
    "the model's logits are not numbers (NaN), so it cannot be scored. Its weights are broken, or float16 overflowed: check "
    "its training loss, or load it with dtype bfloat16 or float32."
)


def encode(row: dict[str, Any], tokenizer: Any, ends: Collection[int] = ()) -> tuple[list[int], list[int]]:
    """Tokens of a row's prompt, and of its completion up to and including the token that ends it.

    Args:
        row: ``{"prompt", "completion"}``, two strings or two lists of messages; or ``{"messages"}``.
        tokenizer: With an end-of-sequence token, or with a chat template if the row is a conversation.
        ends: Additional tokens that end an answer, such as those of a model's generation config
            (`hf_continual.ends.end_tokens`); the tokenizer's own and the chat template's are known.

    Returns:
        The prompt's tokens, at least one, and the answer's, both as SFTTrainer trains on them.

    Raises:
        ValueError: If the row has no prompt or no completion, or the prompt has no tokens.
    """
    prompt, answer = trained_tokens(row, tokenizer)
    if not prompt:
        raise ValueError(
            f"the prompt {as_pair(row)['prompt']!r} has no tokens before the answer; a model cannot start from nothing."
        )
    known = {*ends, *end_tokens(None, tokenizer)}
    end = frame_of(row, tokenizer, known, added_tokens(tokenizer)).end
    return prompt, up_to_end(answer, known if end is None else known | {end})


def prompt_hash(row: dict[str, Any]) -> str:
    """16 hexadecimal digits that identify a prompt without storing it."""
    shown = _asked(row)
    text = shown if isinstance(shown, str) else json.dumps(shown, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompt_text(row: dict[str, Any], most: int = 2000) -> str:
    """The prompt of a row as readable text: messages one after another, a long one without its middle.

    Args:
        row: A row to score.
        most: Maximum number of characters; more are kept of the end, which has the question.

    Returns:
        The text; empty if the row has no prompt.
    """
    asked = _asked(row)
    if isinstance(asked, list) and all(isinstance(m, dict) for m in asked):
        said = [(m.get("role") or m.get("from"), message_text(m) or m.get("value") or "") for m in asked]
        asked = "\n".join(f"{role}: {text}" for role, text in said)
    text = asked if isinstance(asked, str) else ""
    if len(text) <= most:
        return text
    head, tail = most // 4, most - most // 4
    return f"{text[:head]} [{len(text) - most:,} characters left out] {text[-tail:]}"


def _asked(row: dict[str, Any]) -> Any:
    """What a model is asked: the prompt, or the conversation without its last answer; the row if there is neither."""
    for name in ("prompt", "context", "messages", "conversations", "text"):
        found = row.get(name)
        if found is not None:
            spoken = name in ("messages", "conversations") and isinstance(found, list) and len(found) > 1
            return found[:-1] if spoken and _is_answer(found[-1]) else found
    return row


def _is_answer(message: Any) -> bool:
    return isinstance(message, dict) and (message.get("role") or message.get("from")) in ("assistant", "gpt")


def batches_by_length(items: Sequence[Item], lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of rows of similar length, longest first, to reduce padding and reach peak memory early."""
    order = sorted(range(len(items)), key=lambda i: (-lengths[i], i))
    with counting(len(order), "scoring", " rows") as shown:
        for start in range(0, len(order), size):
            yield order[start : start + size]
            shown.update(min(size, len(order) - start))


@contextmanager
def evaluating(model: Any) -> Iterator[torch.device]:
    """Evaluation mode without gradients; every module's mode is restored. Yields the device of the inputs."""
    with evaluation_mode(model), torch.inference_mode():
        yield model.get_input_embeddings().weight.device


def decoder(model: Any) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """The parts of a causal model with or without adapters, so that only chosen positions go through its head.

    Args:
        model: A causal language model.

    Returns:
        The part below the head, and a function from its hidden states to logits, with the scaling and capping
        that some families apply after the head (Cohere, Granite, Gemma 2 and later). A soft prompt stands before every
        row and is not among the hidden states.

    Raises:
        ValueError: If the adapter keeps its virtual tokens in a cache (prefix tuning).
    """
    body = plain_model(model).base_model
    return _AfterPrompt(model, body) if virtual_tokens(model) else body, logits_function(model)


class _AfterPrompt:
    """The part below the head of a model with a soft prompt, which only PEFT's own forward would put before the rows.

    Args:
        model: The model with its adapter.
        body: The part below its head.

    Raises:
        ValueError: See `decoder`.
    """

    def __init__(self, model: Any, body: Any) -> None:
        self.body, self.tokens = body, virtual_tokens(model)
        kept = model.get_prompt(batch_size=1)
        if not isinstance(kept, Tensor):
            kind = getattr(model.active_peft_config.peft_type, "value", model.active_peft_config.peft_type)
            raise ValueError(
                f"the adapter is of the kind {kind}, whose virtual tokens are keys and values and not embeddings; it cannot be "
                f"scored here. Train a soft prompt (PromptTuningConfig) or LoRA instead."
            )
        self.prompt_1PD, self.embed = kept, body.get_input_embeddings()

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
    ) -> Any:
        """Hidden states of the tokens given; the prompt goes first where there is no cache yet."""
        seen = attention_mask.new_ones(attention_mask.shape[0], self.tokens)
        mask_BS = torch.cat([seen, attention_mask], dim=1)
        places = None if position_ids is None else position_ids + self.tokens
        options = {"attention_mask": mask_BS, "past_key_values": past_key_values, "use_cache": use_cache}
        if past_key_values is not None:
            return self.body(input_ids=input_ids, position_ids=places, **options)
        if places is not None:
            places = torch.cat([seen.cumsum(1) - 1, places], dim=1)
        words_BSD = self.embed(input_ids)
        prompt_BPD = self.prompt_1PD.to(words_BSD.dtype).expand(len(input_ids), -1, -1)
        out = self.body(inputs_embeds=torch.cat([prompt_BPD, words_BSD], dim=1), position_ids=places, **options)
        out.last_hidden_state = out.last_hidden_state[:, self.tokens :]
        return out
