"""`hf-continual chat`: a conversation with a saved model on the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from hf_continual.stream.folder_model import model_of


def chat_from_command(
    folder: str, *, prompt: str | None, system: str | None, base: str | None, max_new_tokens: int, temperature: float, dtype: str,
    quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Answer one message, or a conversation line by line.

    Args:
        folder: Folder or Hub id of a model or adapter, or the folder of a plan's run.
        prompt: The one message, or None for a conversation.
        system: System message, or None.
        base: The adapter's base, instead of the recorded one.
        max_new_tokens: Maximum number of tokens of an answer.
        temperature: 0 always takes the likeliest token.
        dtype: dtype of the weights.
        quiet: Whether only answers are printed.
        as_json: Whether each answer is a line of JSON.
    """
    model = model_of(folder, base, dtype)
    from hf_continual.stream.command import set_up

    set_up(quiet=True, as_json=as_json)
    from hf_continual.stream.score_model import loaded

    live, tokenizer, _ = loaded(model)
    messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
    for text in _typed(as_json or quiet) if prompt is None else iter([prompt]):
        messages.append({"role": "user", "content": text})
        said = answer(live, tokenizer, messages, max_new_tokens, temperature)
        sys.stdout.write((json.dumps({"prompt": text, "answer": said}) if as_json else said) + "\n")
        sys.stdout.flush()
        messages.append({"role": "assistant", "content": said})


def _typed(bare: bool) -> Iterator[str]:
    """The user's lines, until an empty line or the end of input."""
    while True:
        if sys.stdin.isatty() and not bare:
            sys.stdout.write("> ")
            sys.stdout.flush()
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def answer(
    model: Any, tokenizer: Any, messages: list[dict[str, str]], max_new_tokens: int = 256, temperature: float = 0.0
) -> str:
    """Generate the model's next message.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer; without a chat template the texts of the conversation are simply joined.
        messages: The conversation so far, a user's message last.
        max_new_tokens: Maximum number of tokens of the answer.
        temperature: 0 always takes the likeliest token.

    Returns:
        The answer, without special tokens.
    """
    if tokenizer.chat_template is not None:
        inputs: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer("\n".join(m["content"] for m in messages), return_tensors="pt")
    inputs.pop("token_type_ids", None)
    inputs = {k: v.to(model.device) for k, v in inputs.items()}
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    produced = model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling)
    return tokenizer.decode(produced[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
