"""Tokenised rows as flat arrays: which tokens are predicted, and where each row and each document begins.

A row may hold several documents (packing); a token is predicted from the tokens before it in its own document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, concatenate_datasets

IGNORED = -100  # label of a token that is not trained
UNMASKED = "unmasked_labels"  # column with the labels as they were before a method masked some of them


@dataclass(frozen=True)
class Document:
    """Tokens that are read together; its length is the number of those that are predicted.

    Args:
        tokens: Its tokens, (S,).
        predicted: Places of the tokens that have a label, in order, the first token excepted; (N,).
    """

    tokens: np.ndarray
    predicted: np.ndarray

    def __len__(self) -> int:
        return len(self.predicted)


@dataclass(frozen=True)
class FlatRows:
    """All rows of a dataset, one after the other.

    Args:
        tokens_T: Tokens, int64.
        labels_T: Labels, -100 where a token is not trained.
        rows: Token at which each row begins, and the end; (K + 1).
        documents: The same for each document.
    """

    tokens_T: np.ndarray
    labels_T: np.ndarray
    rows: np.ndarray
    documents: np.ndarray

    def first(self, number: int) -> FlatRows:
        """The first rows."""
        end = int(self.rows[number])
        return FlatRows(
            self.tokens_T[:end], self.labels_T[:end], self.rows[: number + 1], self.documents[self.documents <= end]
        )

    @property
    def predicted_T(self) -> np.ndarray:
        """Tokens that have a label and another token of their document before them; bool."""
        found = self.labels_T != IGNORED
        found[self.documents[:-1][np.diff(self.documents) > 0]] = False
        return found

    def reading(self) -> list[Document]:
        """The documents with a predicted token; the predicted tokens of all of them are those of `predicted_T`, in order."""
        predicted_T = self.predicted_T
        return [
            Document(self.tokens_T[a:b], np.flatnonzero(predicted_T[a:b]))
            for a, b in _pairs(self.documents)
            if predicted_T[a:b].any()
        ]

    def digest(self) -> str:
        """A hash of tokens, documents and which tokens are predicted; 64 hexadecimal digits."""
        found = hashlib.sha256()
        for part in (self.tokens_T, self.documents, self.predicted_T):
            found.update(np.ascontiguousarray(part).view(np.uint8).data)
        return found.hexdigest()


def _pairs(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    return zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)


def flat_rows(rows: Dataset, who: str) -> FlatRows:
    """Read tokenised rows; 17 bytes per token in memory.

    Args:
        rows: Rows with `input_ids` and `labels`; packed ones also have `seq_lengths`.
        who: The method that asks, for messages.

    Returns:
        The rows.

    Raises:
        ValueError: If rows are not tokenised before they are collated.
    """
    if missing := {"input_ids", "labels"} - set(rows.column_names):
        raise ValueError(
            f"{who} reads the task's tokens before training, but the rows have no {' and '.join(sorted(missing))} before they "
            f"are collated (columns {rows.column_names}). Give rows that SFTTrainer tokenises, or drop the method."
        )
    tokens_T, lengths = _column(rows, "input_ids")
    labels_T, _ = _column(rows, "labels")
    inner = _column(rows, "seq_lengths")[0] if "seq_lengths" in rows.column_names else lengths
    return FlatRows(tokens_T.astype(np.int64), labels_T.astype(np.int64), _offsets(lengths), _offsets(inner))


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _column(rows: Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """All values of a column of lists, and the length of each list."""
    table: Any = rows.select_columns([name]).with_format("arrow")[:]
    column = table[name].combine_chunks()
    column = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
    return column.flatten().to_numpy(zero_copy_only=False), column.value_lengths().to_numpy(zero_copy_only=False)


def with_labels(rows: Dataset, flat: FlatRows, labels_T: np.ndarray) -> Dataset:
    """Rows with other labels; the labels before any such change stay in the column `UNMASKED`.

    Args:
        rows: The rows.
        flat: The same rows.
        labels_T: Their new labels.

    Returns:
        The rows, in the same order.
    """
    features: Any = rows.features
    kept: Any = (
        rows.remove_columns("labels") if UNMASKED in rows.column_names else rows.rename_column("labels", UNMASKED)
    )
    column = pa.LargeListArray.from_arrays(pa.array(flat.rows), pa.array(labels_T))
    made = Dataset(pa.table({"labels": column})).cast(Features(labels=features["labels"]))
    return concatenate_datasets([kept, made], axis=1)
