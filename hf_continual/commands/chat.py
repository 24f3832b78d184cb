"""`hf-continual chat`."""

from __future__ import annotations

from typing import Annotated

import typer


def chat(
    folder: Annotated[
        str, typer.Argument(help="Folder or Hub id of a model or adapter, or the folder of a plan's run.")
    ],
    prompt: Annotated[str | None, typer.Option(help="One message to answer, instead of a conversation.")] = None,
    system: Annotated[str | None, typer.Option(help="System message at the start.")] = None,
    base: Annotated[str | None, typer.Option(help="The adapter's base, if it was moved.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    dtype: Annotated[str, typer.Option(help="dtype of the weights: float32, bfloat16, float16 or auto.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print answers only, no sign to type at.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each answer as a line of JSON.")] = False,
) -> None:
    """Talk to a model: type a message, read the answer; an empty line or Ctrl-D ends."""
    from hf_continual.stream.chat import chat_from_command

    chat_from_command(
        folder, prompt=prompt, system=system, base=base, max_new_tokens=max_new_tokens, temperature=temperature, dtype=dtype,
        quiet=quiet, as_json=as_json,
    )  # fmt: skip
