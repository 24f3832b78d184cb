"""The rows of a gauge as tokens, with a mask of the predicted ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from hf_continual.evaluation.prompts import encode

# Tokens whose logits exist at the same time: 512 x 150,000 logits in float32 are 0.3 GB.
POSITIONS = 512


def are_texts(rows: Sequence[ProbeRow]) -> bool:
    """Whether every token except the first is predicted in all rows."""
    return all(all(row.predicted[1:]) for row in rows)


@dataclass(frozen=True)
class ProbeRow:
    """A row of a gauge.

    Args:
        ids: Its tokens, length S.
        predicted: Which of them are predicted from those before, length S; never the first.
    """

    ids: tuple[int, ...]
    predicted: tuple[bool, ...]

    @property
    def tokens(self) -> int:
        """Number of predicted tokens."""
        return sum(self.predicted)


def probe_rows(rows: Dataset, tokenizer: Any, max_length: int, name: str) -> list[ProbeRow]:
    """Tokenise the rows of a gauge as scoring does, so that a gauge and a score of the same rows agree.

    Args:
        rows: With ``text``, where every token except the first is predicted; or with ``prompt`` and ``completion`` or
            ``messages``, where the answer is; or tokenised, with ``input_ids`` and ``labels``.
        tokenizer: The model's.
        max_length: Number of tokens to which a row is truncated.
        name: Name of the gauge, for messages.

    Returns:
        The rows.

    Raises:
        ValueError: If the columns are of another kind, or a row has no token to predict within `max_length`.
    """
    found = []
    for i, row in enumerate(rows):
        ids, predicted = _tokens(dict(row), tokenizer, name)
        ids, predicted = ids[:max_length], (False, *predicted[1:max_length])
        if not any(predicted):
            raise ValueError(
                f"gauge {name!r}: row {i + 1} has no token to predict within its first {max_length} tokens. Raise max_length, "
                f"or remove the row."
            )
        found.append(ProbeRow(tuple(ids), tuple(predicted)))
    return found


def _tokens(row: Mapping[str, Any], tokenizer: Any, name: str) -> tuple[list[int], list[bool]]:
    if "input_ids" in row:
        ids, labels = list(row["input_ids"]), row.get("labels") or row["input_ids"]
        return ids, [label != -100 for label in labels]
    if isinstance(row.get("text"), str):
        ids = list(tokenizer(row["text"])["input_ids"])
        return ids, [True] * len(ids)
    try:
        prompt, answer = encode(dict(row), tokenizer)
    except ValueError as error:
        raise ValueError(
            f"gauge {name!r}: {error} Rows of a gauge have 'text', or 'prompt' and 'completion', or 'messages'."
        ) from error
    return [*prompt, *answer], [False] * len(prompt) + [True] * len(answer)


def batches(rows: Sequence[ProbeRow], mine: Sequence[int], most: int) -> Iterator[list[int]]:
    """Rows in batches of at most `most`, in which at most `POSITIONS` tokens are predicted if a row has no more alone.

    Args:
        rows: All rows of the gauge.
        mine: Those of this process.
        most: Rows of a batch.

    Yields:
        list[int]: Indices of a batch's rows; rows of similar length are grouped.
    """
    batch: list[int] = []
    for i in sorted(mine, key=lambda i: (-len(rows[i].ids), i)):
        if batch and (len(batch) == most or sum(rows[k].tokens for k in (*batch, i)) > POSITIONS):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
