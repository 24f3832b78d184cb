"""Rows from anywhere: a dataset in memory, a file, a saved folder, or a dataset on the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
}


def load_rows(source: Dataset | str | Path | Sequence[dict[str, Any]], split: str = "train") -> Dataset:
    """Read rows from what a user names.

    Args:
        source: A `datasets.Dataset`; a list of row dictionaries; the path of a ``.jsonl``, ``.json``,
            ``.parquet``, ``.csv`` or ``.txt`` file; the folder of a saved dataset; or the id of a
            dataset on the Hub, ``owner/name``, with ``:configuration`` and ``@revision`` behind it.
        split: Split to read where the source has several.

    Returns:
        The rows, at least one.

    Raises:
        FileNotFoundError: If a path is named that does not exist.
        TypeError: If the source is none of the above, such as a streaming dataset.
        ValueError: If the file type is unknown, the split is missing, or there is no row.
    """
    if isinstance(source, Dataset):
        rows = source
    elif isinstance(source, str | Path):
        rows = _read(str(source), split)
    elif isinstance(source, Sequence):
        if not all(isinstance(row, dict) for row in source):
            kinds = sorted({type(row).__name__ for row in source})
            raise TypeError(
                f"rows given as a list must be dictionaries such as {{'text': ...}}, got {', '.join(kinds)}."
            )
        rows = Dataset.from_list(list(source))
    else:
        raise TypeError(
            f"rows must be a datasets.Dataset, a list of dictionaries, a path or a Hub id, got "
            f"{type(source).__name__}. A streaming dataset has no length to draw from: take a part "
            f"of it first, for example Dataset.from_list(list(stream.take(1000)))."
        )
    if len(rows) == 0:
        raise ValueError(f"rows is empty: {source!r} holds 0 rows, and there is nothing to draw from.")
    return rows


def _read(source: str, split: str) -> Dataset:
    path = Path(source).expanduser()
    if path.is_dir():
        loaded = load_from_disk(str(path))
        if isinstance(loaded, DatasetDict):
            if split not in loaded:
                raise ValueError(f"{source!r} has the splits {', '.join(map(str, loaded))} and none called {split!r}.")
            return loaded[split]
        return loaded
    if path.is_file():
        if path.suffix not in READERS:
            raise ValueError(
                f"{source!r}: files of type {path.suffix or 'no suffix'!r} cannot be read, only "
                f"{', '.join(READERS)}. Convert it, or pass a datasets.Dataset."
            )
        if path.stat().st_size == 0:
            raise ValueError(f"rows is empty: {source!r} holds 0 rows, and there is nothing to draw from.")
        return load_dataset(READERS[path.suffix], data_files=str(path), split="train")
    if path.suffix in READERS or path.is_absolute() or source.startswith(".") or source.count("/") > 1:
        raise FileNotFoundError(
            f"{source!r} does not exist (looked in {Path.cwd()}). Name an existing file or folder, or a "
            f"dataset on the Hub as 'owner/name'."
        )
    name, _, revision = source.partition("@")
    name, _, configuration = name.partition(":")
    return load_dataset(name, configuration or None, split=split, revision=revision or None)


def row_lengths(rows: Dataset) -> np.ndarray:
    """Number of tokens of each tokenised row, without turning a token into a Python object."""
    column = rows.select_columns(["input_ids"]).with_format("arrow")[:]["input_ids"]
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return np.asarray(pc.list_value_length(column), dtype=np.int64)  # pyrefly: ignore[missing-attribute]
