"""A row's tokens as TRL's SFTTrainer trains on them: scoring must use what was learned."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from hf_continual.trl_data import common_prefix_length, is_conversational_from_value, maybe_convert_to_chatml

Row = Mapping[str, Any]


def as_pair(row: Row) -> dict[str, Any]:
    """A row as prompt and completion.

    Args:
        row: ``{"prompt", "completion"}`` as two strings or two lists of messages, or ``{"messages"}``, of which the
            last message, the assistant's, is the completion. Messages may also be written ``{"from", "value"}``.

    Returns:
        The row with `prompt` and `completion`, and its other columns.

    Raises:
        ValueError: If it has no such pair.
    """
    row = dict(row)
    if is_conversational_from_value(row):
        row = maybe_convert_to_chatml(copy.deepcopy(row))  # it modifies its argument
    if row.get("prompt") is not None and row.get("completion") is not None:
        if isinstance(row["prompt"], str) != isinstance(row["completion"], str):
            raise ValueError(
                f"the prompt is of type {type(row['prompt']).__name__} and the completion of type "
                f"{type(row['completion']).__name__}; make both text, or both lists of messages."
            )
        return row
    messages = row.get("messages")
    if not messages:
        raise ValueError(
            f"a row to score needs 'prompt' and 'completion', but this one has {sorted(row)}. Map its columns, or name the "
            f"columns that hold them; a conversation may also be one column 'messages'."
        )
    if len(messages) < 2 or messages[-1].get("role") != "assistant":
        raise ValueError(
            f"the answer of a row with 'messages' is its last message, after at least one other, and the assistant's; this "
            f"row has {len(messages)} and ends with role {messages[-1]['role']!r}. "
            + (other_roles(messages) or "Drop the messages after the answer.")
        )
    return {**row, "prompt": messages[:-1], "completion": messages[-1:]}


def other_roles(messages: Sequence[Row]) -> str:
    """Advice for the roles of ShareGPT rows, which templates do not know; empty if there are none."""
    if not {"human", "gpt"} & {str(m.get("role")) for m in messages}:
        return ""
    return (
        "Chat templates, and SFTTrainer, know the roles 'user' and 'assistant': use these instead of 'human' and 'gpt'."
    )


def trained_tokens(row: Row, tokenizer: Any) -> tuple[list[int], list[int]]:
    """All tokens of a row in the order in which SFTTrainer trains on them, split where its completion mask starts.

    Args:
        row: See `as_pair`.
        tokenizer: With an end-of-sequence token for rows of text, with a chat template for conversations.

    Returns:
        The tokens of the prompt and those of the completion, before any truncation.

    Raises:
        ValueError: If the row has no prompt and completion, or the tokenizer has no end-of-sequence token.
    """
    pair = as_pair(row)
    prompt, completion = pair["prompt"], pair["completion"]
    if isinstance(prompt, str):
        end = tokenizer.eos_token
        if end is None:
            raise ValueError(
                "the tokenizer has no end-of-sequence token, so the end of a plain-text answer is not known. Set "
                "tokenizer.eos_token to the token that ended the answers in training."
            )
        whole = prompt + completion if completion.endswith(end) else prompt + completion + end
        first, tokens = list(tokenizer(prompt)["input_ids"]), list(tokenizer(whole)["input_ids"])
    else:
        first = list(rendered(pair, tokenizer, prompt, True, tokenize=True)["input_ids"])
        tokens = list(rendered(pair, tokenizer, [*prompt, *completion], False, tokenize=True)["input_ids"])
    shared = common_prefix_length(first, tokens)
    return tokens[:shared], tokens[shared:]


def conversation_tokens(row: Row, tokenizer: Any) -> list[int]:
    """The tokens of a whole conversation, whichever role is last.

    Args:
        row: ``{"messages"}``, ``{"conversations"}``, or ``{"prompt", "completion"}`` as messages.
        tokenizer: With a chat template.

    Returns:
        All tokens.
    """
    plain = dict(row)
    if is_conversational_from_value(plain):
        plain = maybe_convert_to_chatml(copy.deepcopy(plain))
    messages = plain.get("messages") or [*plain["prompt"], *plain["completion"]]
    return list(rendered(plain, tokenizer, messages, False, tokenize=True)["input_ids"])


def rendered(row: Row, tokenizer: Any, messages: Sequence[Any], prompt: bool, tokenize: bool) -> Any:
    """Messages through the chat template, with the tools and template options of the row."""
    tools = row.get("tools")
    return tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=prompt, tokenize=tokenize, return_dict=tokenize,
        tools=json.loads(tools) if isinstance(tools, str) else tools, **(row.get("chat_template_kwargs") or {}),
    )  # fmt: skip


def reference(row: Row) -> str:
    """The text of a row's answer: its completion, or the text and tool calls of the last message."""
    answer = as_pair(row)["completion"]
    return answer if isinstance(answer, str) else message_text(answer[-1])


def message_text(message: Row) -> str:
    """The text of a message whose content is a text or a list of parts; tool calls follow as JSON, one per line."""
    content = message.get("content")
    text = content or "" if isinstance(content, str | None) else "".join(part.get("text") or "" for part in content)
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n".join([text] * bool(text) + calls)


def has_thoughts(row: Row) -> bool:
    """Whether a row's answer includes thoughts, in a separate field or in its text."""
    answer = as_pair(row)["completion"]
    if isinstance(answer, str):
        return "</think>" in answer
    return bool(answer[-1].get("reasoning_content") or answer[-1].get("thinking")) or "</think>" in message_text(
        answer[-1]
    )


def with_answer(row: Row, text: str) -> dict[str, Any]:
    """The row with its answer replaced by another, without tool calls; in the row's form."""
    pair = as_pair(row)
    if isinstance(pair["completion"], str):
        return {**pair, "completion": text}
    *before, last = pair["completion"]
    content = [{"type": "text", "text": text}] if isinstance(last.get("content"), list) else text
    plain = {k: v for k, v in last.items() if k != "tool_calls"}
    return {**pair, "completion": [*before, {**plain, "content": content}]}
