"""Rows of any dataset as rows of prompt and completion: columns mapped, labels named, prompts cut."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from hf_continual.named import did_you_mean, nearest

# "Choose one from the option. Option: a, b, c." of the Long Sequence prompts; labels hold no line break.
OPTIONS = re.compile(r" ?Choose one from the options?\. Options?: [^\n]*?\.(?=\n)")


def map_columns(rows: Dataset, columns: Mapping[str, str], labels: Sequence[str] | None = None) -> Dataset:
    """Make the columns that training and scoring need.

    Args:
        rows: Rows with any columns.
        columns: New column -> old column, or -> a text with old columns in braces, for example
            ``{"prompt": "{title}\\n{body}\\nTopic:", "completion": " {label}"}``.
        labels: Names of the classes where a column holds their numbers; class names in the dataset itself
            need no labels.

    Returns:
        Rows with the new columns only.

    Raises:
        ValueError: If an old column does not exist, or a class has no name.
    """
    named = {n: f.names for n, f in rows.features.items() if isinstance(f, ClassLabel)}
    used: dict[str, list[str]] = {}
    for new, template in columns.items():
        if "{" in template:
            used[new] = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
        else:
            used[new] = [template]
        for old in used[new]:
            if old not in rows.column_names:
                hint = did_you_mean(old, rows.column_names)
                raise ValueError(
                    f"{new!r} is made from the column {old!r}, which the rows do not have.{hint} They have {rows.column_names}."
                )

    def shown(row: dict[str, Any], old: str) -> Any:
        value = row[old]
        names = named.get(old, labels)
        if names is None or isinstance(value, bool) or not isinstance(value, int):
            return value
        if not 0 <= value < len(names):
            raise ValueError(
                f"column {old!r} holds the class {value}, and labels names {len(names)} classes ({', '.join(names)})."
            )
        return names[value]

    def mapped(row: dict[str, Any]) -> dict[str, Any]:
        return {
            new: template.format(**{old: shown(row, old) for old in used[new]})
            if "{" in template
            else shown(row, template)
            for new, template in columns.items()
        }

    return Dataset.from_list([mapped(dict(row)) for row in rows])  # pyrefly: ignore[no-matching-overload]


def check_columns(rows: Dataset, wanted: Sequence[str], what: str) -> None:
    """Refuse rows that lack a column.

    Args:
        rows: The rows.
        wanted: Columns that must be there.
        what: Purpose, for the message.

    Raises:
        ValueError: If one is missing; suggests the closest name.
    """
    for name in wanted:
        if name not in rows.column_names:
            close = nearest(name, rows.column_names)
            hint = f" Is it {close!r}? Then write columns: {{{name}: {close}}}." if close else ""
            raise ValueError(
                f"{what} needs the column {name!r}, the rows have {rows.column_names}.{hint} Use `columns` to map one to the other."
            )


def take(rows: Dataset, number: int | None, seed: int = 0) -> Dataset:
    """A subset of the rows: the first `number` of a seeded order; all of them if there are fewer."""
    if number is None or number >= len(rows):
        return rows
    order = np.random.default_rng([seed, len(rows)]).permutation(len(rows))
    return rows.select(order[:number].tolist())  # pyrefly: ignore[bad-return]


def without_options(rows: Dataset) -> Dataset:
    """Prompts without the sentence that lists the options.

    Args:
        rows: Rows with a column `prompt`.

    Returns:
        The same rows, shortened.

    Raises:
        ValueError: If no prompt has such a sentence, or prompts are messages.
    """
    _check_text(rows, "drop_options")
    shortened = [OPTIONS.sub("", prompt, count=1) for prompt in rows["prompt"]]
    if shortened == rows["prompt"][:]:
        raise ValueError(
            "drop_options: no prompt has a sentence that lists options ('Choose one from the option. Option: ...')."
        )
    return rows.remove_columns("prompt").add_column("prompt", shortened)  # pyrefly: ignore


def cut_prompts(rows: Dataset, tokens: int, tokenizer: Any) -> Dataset:
    """Cut prompts to at most `tokens` tokens, before their last line, which asks for the answer.

    Args:
        rows: Rows with a column `prompt`.
        tokens: Maximum number of tokens of a prompt.
        tokenizer: The model's.

    Returns:
        The same rows, shortened.

    Raises:
        ValueError: If a last line alone is longer, or if prompts are messages.
    """
    _check_text(rows, "max_prompt_tokens")
    shortened = []
    for prompt in rows["prompt"]:
        head, line, tail = prompt.rpartition("\n")
        end = line + tail if line else prompt
        room = tokens - len(tokenizer(end)["input_ids"])
        if room < 0:
            raise ValueError(f"max_prompt_tokens={tokens} is less than the last line of a prompt takes: {end!r}.")
        kept = tokenizer(head)["input_ids"] if line else []
        if len(tokenizer(prompt)["input_ids"]) > tokens and line:
            text = tokenizer.decode(kept[:room]).rstrip() + end
            while len(tokenizer(text)["input_ids"]) > tokens:
                room -= 1
                text = tokenizer.decode(kept[:room]).rstrip() + end
            prompt = text
        shortened.append(prompt)
    return rows.remove_columns("prompt").add_column("prompt", shortened)  # pyrefly: ignore


def _check_text(rows: Dataset, option: str) -> None:
    """Refuse prompts that are messages: they cannot be cut like text."""
    if len(rows) and not isinstance(rows[0]["prompt"], str):
        raise ValueError(
            f"{option} shortens text prompts, and these are lists of messages. Leave it out, and shorten the "
            f"messages in the rows."
        )
