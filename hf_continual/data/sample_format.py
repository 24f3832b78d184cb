r"""The format in which a model learns to write samples of its tasks itself, and what it wrote read back as rows.

Sun et al., "LAMOL: LAnguage MOdeling for Lifelong Language Learning", ICLR 2020, https://arxiv.org/abs/1909.03329.

    trained as usual          question answer <end>                       loss on the answer
    trained to be written     [generate] question [answer] answer <end>   loss on all after the first marker

The markers are short texts, tokenised on their own, so that no token is added and no embedding grows. A row without a
question (plain text, or one trained on every token) is ``[generate] text <end>``. Everything is done on tokens: what a
chat template puts into a row is learned and written with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset

from hf_continual.ends import added_tokens, end_tokens
from hf_continual.tensors.reference import most_tokens

Tokens = Sequence[int]
IGNORED = -100  # label of a token that is not trained
Flaw = Literal["no end", "no answer", "several answers", "empty", "a marker inside", "too long"]


def places_of(part: Tokens, tokens: Tokens | np.ndarray) -> list[int]:
    """Where a sequence of tokens begins in a longer one."""
    ids, first = np.asarray(tokens, dtype=np.int64), int(part[0])
    starts = np.flatnonzero(ids[: max(len(ids) - len(part) + 1, 0)] == first)
    wanted = np.asarray(part, dtype=np.int64)
    return [int(i) for i in starts if np.array_equal(ids[i : i + len(part)], wanted)]


def question_and_answer(tokens: Tokens, labels: Tokens) -> tuple[list[int], list[int]] | None:
    """A tokenised row as what is asked and what is trained; tokens after the last trained one are left out.

    Args:
        tokens: Tokens of the row.
        labels: Its labels, -100 for tokens that are not trained.

    Returns:
        Question, empty where every token is trained, and answer; None where none is.

    Raises:
        ValueError: If untrained tokens stand between trained ones, as in a conversation of several turns.
    """
    trained = np.flatnonzero(np.asarray(labels) != IGNORED)
    if not len(trained):
        return None
    first, last = int(trained[0]), int(trained[-1])
    if last - first + 1 != len(trained):
        raise ValueError("a row has several trained parts, such as the turns of a conversation")
    return list(tokens[:first]), list(tokens[first : last + 1])


@dataclass(frozen=True)
class SampleFormat:
    """The format in which a model learns to write samples.

    Args:
        generate: Tokens of the marker that a sample begins with.
        answer: Tokens of the marker between question and answer.
        first: The token that the tokenizer begins a text with, or None; it stays in front of the marker.
        ends: Tokens that end a sample.
        most: Most tokens of a row in this format; longer ones are not learned.
    """

    generate: tuple[int, ...]
    answer: tuple[int, ...]
    first: int | None = None
    ends: frozenset[int] = frozenset()
    most: int | None = None

    @property
    def opening(self) -> list[int]:
        """What a sample is written from."""
        return [*([] if self.first is None else [self.first]), *self.generate]

    def written(self, tokens: Tokens, labels: Tokens) -> dict[str, list[int]] | None:
        """A row in this format.

        Args:
            tokens: Tokens of the row.
            labels: Its labels.

        Returns:
            `input_ids` and `labels`; None where it has no trained token, or more than `most` tokens.
        """
        if (parts := question_and_answer(tokens, labels)) is None:
            return None
        question, answer = parts
        body = [*question, *self.answer, *answer] if question else answer
        head = list(self.generate)
        if self.first is not None and body[0] == self.first:
            head, body = [self.first, *head], body[1:]
        if self.most is not None and len(head) + len(body) > self.most:
            return None
        return {"input_ids": [*head, *body], "labels": [*[IGNORED] * len(head), *body]}

    def read(self, written: Tokens, questions: bool = True, plain: bool = False) -> dict[str, list[int]] | Flaw:
        """What a model wrote after `opening`, as a row to be trained as usual.

        Args:
            written: The new tokens.
            questions: Whether rows with a question were learned.
            plain: Whether rows without one were.

        Returns:
            `input_ids` and `labels`; or what is wrong with it.
        """
        end = next((i for i, token in enumerate(written) if token in self.ends), None)
        if end is None:
            return "no end"
        body = list(written[: end + 1])
        if self.most is not None and len(self.opening) + len(body) > self.most:
            return "too long"
        if places_of(self.generate, body):
            return "a marker inside"
        places = places_of(self.answer, body)
        if len(places) > 1 or (places and not questions):
            return "several answers" if questions else "a marker inside"
        if not places and not plain:
            return "no answer"
        question, answer = ([], body) if not places else (body[: places[0]], body[places[0] + len(self.answer) :])
        if (places and not question) or len(answer) < 2:  # the end alone is not an answer
            return "empty"
        lead = [] if self.first is None else [self.first]
        if not places:
            return {"input_ids": [*lead, *answer], "labels": [*lead, *answer]}
        question = [*lead, *question]
        return {"input_ids": [*question, *answer], "labels": [*[IGNORED] * len(question), *answer]}


def format_of(
    rows: Dataset, tokenizer: Any, model: Any, generate: str, answer: str, max_length: int | None, who: str
) -> SampleFormat:
    """The format for a task's rows.

    Args:
        rows: The task's rows, tokenised.
        tokenizer: The tokenizer.
        model: The model, for the tokens that end a text and the number of its positions.
        generate: Text of the first marker.
        answer: Text of the second.
        max_length: Where the trainer cuts rows.
        who: The method, for messages.

    Returns:
        The format.

    Raises:
        ValueError: If a marker does not have its own tokens.
    """
    ids = {text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (generate, answer)}
    unknown = tokenizer.unk_token_id
    for text, tokens in ids.items():
        if not tokens or (unknown is not None and unknown in tokens):
            raise ValueError(
                f"{who}: the tokenizer has no tokens for the marker {text!r} (it makes {list(tokens)} of it). Give markers of "
                f"words that it knows and that no row holds: gen_marker=..., answer_marker=...."
            )
    one, other = ids[generate], ids[answer]
    if places_of(one, other) or places_of(other, one):
        raise ValueError(
            f"{who}: the markers {generate!r} and {answer!r} become the tokens {list(one)} and {list(other)}, of which one holds "
            f"the other, so they could not be told apart. Give others: gen_marker=..., answer_marker=...."
        )
    shown: Any = rows[0]
    ends = set(end_tokens(model, tokenizer))
    last = next((label for label in reversed(shown["labels"]) if label != IGNORED), None)
    if last in added_tokens(tokenizer).special:  # such as the end of a turn, which may not be the tokenizer's end
        ends.add(last)
    first = tokenizer.bos_token_id if shown["input_ids"][:1] == [tokenizer.bos_token_id] else None
    limits = [n for n in (max_length, most_tokens(model)) if n is not None]
    return SampleFormat(one, other, first, frozenset(ends), min(limits, default=None))


def documents(rows: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and labels of each row, and of each row within a packed one, without making Python numbers of them."""
    tables: Any = rows.with_format("arrow").iter(batch_size=1000)
    for table in tables:
        columns: Any = {name: _flat(table, name) for name in ("input_ids", "labels")}
        lengths = _flat(table, "seq_lengths")[0] if "seq_lengths" in table.column_names else columns["input_ids"][1]
        start = 0
        for length in lengths.tolist():
            yield tuple(values[start : start + length] for values, _ in columns.values())  # pyrefly: ignore[bad-yield]
            start += length


def _flat(table: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """All values of a column of lists, and the length of each list."""
    column = table[name].combine_chunks()
    column = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
    return column.flatten().to_numpy(zero_copy_only=False), column.value_lengths().to_numpy(zero_copy_only=False)
