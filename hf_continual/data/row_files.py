"""Rows from a file, exactly as they are written: text stays text, and a line that is not a row is named in the error.

JSON and CSV are read here and not by `datasets`, whose readers turn text such as ``2024-01-01`` into a date, ``NA``
into nothing, and the first columns of an overlong CSV line into an index. They are read into memory; larger
data belongs in Parquet or a saved dataset, which stay on disk.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from hf_continual.atomic_files import DamagedFile, parse_json, shown

_INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")
_FLOAT = re.compile(r"-?\d+(\.\d+)?([eE][-+]?\d+)?")
# Columns that are text whatever they contain: an answer may be a number.
TEXT = ("prompt", "completion", "text", "context")


@dataclass(frozen=True)
class FileRows:
    """Rows of a file.

    Args:
        rows: The rows.
        places: Where each one is, such as ``"rows.jsonl, line 7"``; None where a file has no lines.
    """

    rows: Dataset
    places: Sequence[str] | None = None


def read_row_file(path: Path) -> FileRows:
    """Read a file of rows.

    Args:
        path: A ``.jsonl``, ``.json``, ``.csv``, ``.txt`` or ``.parquet`` file.

    Returns:
        Its rows; may be empty.

    Raises:
        DamagedFile: If the content does not match the file type; names the line and what it contains.
        ValueError: If its type is not known.
    """
    if path.suffix not in READERS:
        raise ValueError(
            f"{str(path)!r}: files of type {path.suffix or 'no suffix'!r} cannot be read, only "
            f"{', '.join(READERS)}. Convert it, or pass a datasets.Dataset."
        )
    return READERS[path.suffix](path)


def _decoded(path: Path) -> str:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The byte-order mark at the beginning of a file is not decoded.
        at = error.start + (3 if raw.startswith(b"\xef\xbb\xbf") else 0)
        line = raw[:at].count(b"\n") + 1
        raise DamagedFile(
            f"{path}, line {line}: the byte 0x{raw[at]:02x} is not UTF-8. Save the file as UTF-8 text."
        ) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise DamagedFile(f"{path}, line {line}: a NUL byte, which no text file holds. The file is damaged or binary.")
    return text


def _json(path: Path) -> FileRows:
    """A list of objects, or one object per line."""
    text = _decoded(path)
    if text.lstrip().startswith("["):
        try:
            found = parse_json(text, str(path))
        except DamagedFile:
            if path.suffix == ".json":
                raise
            found = None  # one list per line: refused below, with the line
        if isinstance(found, list) and (not found or any(isinstance(row, dict) for row in found)):
            return _checked(found, [f"{path}, entry {i}" for i in range(1, len(found) + 1)])
    elif path.suffix == ".json" and (whole := _one_object(text)) is not None:
        return _checked([whole], [str(path)])
    rows, places = [], []
    # Not splitlines: a text may contain U+0085 or U+2028, which JSON does not escape.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            places.append(f"{path}, line {number}")
            rows.append(parse_json(line, places[-1], unique=True))
    return _checked(rows, places)


def _one_object(text: str) -> dict[str, Any] | None:
    """A text that is a single object over several lines."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _checked(rows: Sequence[Any], places: Sequence[str]) -> FileRows:
    """Rows as columns; anything that is not an object is refused."""
    for row, place in zip(rows, places, strict=True):
        if not isinstance(row, dict):
            raise DamagedFile(
                f'{place}: a row must be an object such as {{"prompt": ..., "completion": ...}}, and this one is {shown(row)}.'
            )
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    return FileRows(_dataset(columns, places), places)


def _dataset(columns: dict[str, list[Any]], places: Sequence[str]) -> Dataset:
    try:
        # Mixed values in a column that is not trained on are kept unchanged.
        return Dataset.from_dict(columns, on_mixed_types="use_json")
    except (ValueError, TypeError, OverflowError) as error:
        for i, place in enumerate(places):
            try:
                Dataset.from_dict({n: [values[i]] for n, values in columns.items()}, on_mixed_types="use_json")
            except (ValueError, TypeError, OverflowError) as own:
                raise DamagedFile(f"{place}: this row cannot be kept: {own}.") from error
        raise DamagedFile(f"{places[0].partition(', ')[0]}: its rows do not fit together: {error}.") from error


def _csv(path: Path) -> FileRows:
    """Read a header line, then rows with the same number of fields."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(_decoded(path), newline=""), strict=True)
    names: list[str] = []
    rows, places, begin = [], [], 1
    try:
        for fields in reader:
            line, begin = begin, reader.line_num + 1
            if not fields:
                continue
            if not names:
                names = fields
                if twice := [n for n in names if names.count(n) > 1]:
                    raise DamagedFile(f"{path}, line {line}: the column {twice[0]!r} is named twice.")
                continue
            if len(fields) != len(names):
                raise DamagedFile(
                    f"{path}, line {line}: {len(fields)} fields, and line 1 names {len(names)} ({', '.join(names)}): "
                    f"{shown(','.join(fields))}. Put a field that holds a comma in double quotes."
                )
            rows.append(fields)
            places.append(f"{path}, line {line}")
    except csv.Error as error:
        raise DamagedFile(f"{path}, line {begin}: not valid CSV: {error}.") from error
    columns = {name: _typed(name, [row[i] for row in rows]) for i, name in enumerate(names)}
    return FileRows(_dataset(columns, places), places)


def _typed(name: str, values: list[str]) -> list[Any]:
    """Convert to numbers if every value of a column is one, such as a row's class."""
    if name in TEXT:
        return values
    if all(_INTEGER.fullmatch(v) for v in values):
        return [int(v) for v in values]
    return [float(v) for v in values] if all(_FLOAT.fullmatch(v) for v in values) else values


def _text(path: Path) -> FileRows:
    _decoded(path)
    rows: Any = load_dataset("text", data_files=str(path), split="train")
    return FileRows(rows)


def _parquet(path: Path) -> FileRows:
    try:
        rows: Any = load_dataset("parquet", data_files=str(path), split="train")
    except Exception as error:
        # A damaged Parquet file raises one of many pyarrow errors, sometimes wrapped in one of datasets.
        said = str(error.__cause__ or error).splitlines()[0].rstrip(".")
        raise DamagedFile(f"{path} cannot be read as Parquet: {said}. Write the file again.") from error
    return FileRows(rows)


READERS: dict[str, Callable[[Path], FileRows]] = {
    ".jsonl": _json,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
    ".txt": _text,
}
