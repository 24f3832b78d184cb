"""Rows from anywhere: a dataset in memory, a file, a saved folder, or a dataset on the Hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError

from hf_continual.atomic_files import DamagedFile
from hf_continual.data.row_files import READERS, FileRows, read_row_file
from hf_continual.data.row_values import TEXTUAL, check_values
from hf_continual.paths import is_path

# Names that a plan replaces with rows; see `hf_continual.stream.past_rows`.
OF_A_PLAN = ("earlier_tasks", "kept")


def load_rows(
    source: Dataset | str | Path | Sequence[dict[str, Any]],
    split: str = "train",
    checked: Sequence[str] | None = None,
) -> Dataset:
    """Read rows from a source that a user names.

    Args:
        source: A `datasets.Dataset`; a list of row dictionaries; the path of a ``.jsonl``, ``.json``,
            ``.parquet``, ``.csv`` or ``.txt`` file; the folder of a saved dataset; or the id of a
            dataset on the Hub, ``owner/name``, optionally followed by ``:configuration`` and ``@revision``.
        split: Split to read where the source has several.
        checked: Columns whose values must be text or messages, see `check_values`; by default those of a file are
            checked, and rows from memory are not.

    Returns:
        The rows, at least one.

    Raises:
        FileNotFoundError: If a named path does not exist.
        TypeError: If the source is none of the above, such as a streaming dataset.
        ValueError: If the file type is unknown, the split is missing, there are no rows, or a row holds a
            wrong value; names the file, the line and the value.
    """
    places = None
    if isinstance(source, Dataset):
        rows = source
    elif isinstance(source, DatasetDict | IterableDatasetDict):
        raise TypeError(
            f"rows is a {type(source).__name__} with the splits {', '.join(map(str, source))}: pass one of them, such as "
            f"data[{next(iter(source), split)!r}]."
        )
    elif isinstance(source, str | Path):
        found = _read(str(source), split)
        rows, places = found.rows, found.places
    elif isinstance(source, Sequence):
        if not all(isinstance(row, dict) for row in source):
            kinds = sorted({type(row).__name__ for row in source})
            raise TypeError(
                f"rows given as a list must be dictionaries such as {{'text': ...}}, got {', '.join(kinds)}."
            )
        names = list(dict.fromkeys(name for row in source for name in row))
        rows = Dataset.from_dict({name: [row.get(name) for row in source] for name in names}, on_mixed_types="use_json")
    else:
        raise TypeError(
            f"rows must be a datasets.Dataset, a list of dictionaries, a path or a Hub id, got "
            f"{type(source).__name__}. A streaming dataset has no length to draw from: take a part "
            f"of it first, for example Dataset.from_list(list(stream.take(1000)))."
        )
    if len(rows) == 0:
        raise ValueError(f"{source!r} has no rows: there is nothing to draw from.")
    named = str(source) if isinstance(source, str | Path) else None
    check_values(rows, named or "rows in Python", (TEXTUAL if named else ()) if checked is None else checked, places)
    return rows


def _read(source: str, split: str) -> FileRows:
    path = Path(source).expanduser()
    if path.is_dir():
        try:
            loaded = load_from_disk(str(path))
        except Exception as error:
            # A damaged folder, or one that is not a dataset, raises one of many errors.
            said = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
            raise DamagedFile(f"{source!r} cannot be read as a saved dataset: {said}. Save it again.") from error
        if isinstance(loaded, DatasetDict):
            if split not in loaded:
                raise ValueError(f"{source!r} has the splits {', '.join(map(str, loaded))} and none called {split!r}.")
            return FileRows(loaded[split])
        return FileRows(loaded)
    if path.is_file():
        if path.stat().st_size == 0:
            raise ValueError(f"{source!r} has no rows: there is nothing to draw from.")
        return read_row_file(path)
    if is_path(source, tuple(READERS)):
        raise FileNotFoundError(
            f"{source!r} does not exist (looked in {Path.cwd()}). Name an existing file or folder, or a "
            f"dataset on the Hub as 'owner/name'."
        )
    if source in OF_A_PLAN:
        raise ValueError(
            f"{source!r} stands for rows of earlier tasks, which only a plan has (hf-continual run, train_stream). Elsewhere give the rows "
            f"themselves: a datasets.Dataset, a list of dictionaries, a file or a dataset on the Hub."
        )
    name, _, revision = source.partition("@")
    name, _, configuration = name.partition(":")
    try:
        return FileRows(load_dataset(name, configuration or None, split=split, revision=revision or None))
    except (ConnectionError, DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"{source!r}: there is no such file or folder here (looked in {Path.cwd()}), and the Hub has no such dataset: "
            f"{str(error).rstrip('.')}. Check the spelling; a dataset on the Hub is 'owner/name'."
        ) from error


def row_lengths(rows: Dataset) -> np.ndarray:
    """Number of tokens of each tokenised row, without turning tokens into Python objects."""
    column = rows.select_columns(["input_ids"]).with_format("arrow")[:]["input_ids"]
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return np.asarray(pc.list_value_length(column), dtype=np.int64)  # pyrefly: ignore[missing-attribute]


def digest_of(rows: Dataset, sample: int = 64) -> str:
    """A fingerprint of rows, wherever stored: their number, and the tokens of up to `sample` evenly spread rows."""
    step = max(len(rows) // sample, 1)
    found = hashlib.sha256(str(len(rows)).encode())
    for row in rows.select(range(0, len(rows), step)):
        held: Any = row
        found.update(json.dumps([list(held["input_ids"]), list(held.get("labels") or ())]).encode())
    return found.hexdigest()[:16]
