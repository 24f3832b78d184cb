"""Files that are whole or absent, no matter when a process is killed, and are checked when they are read back."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file next to its place and rename it in one step, once its bytes are on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, data: Any) -> None:
    """Write plain data as JSON, see `write_text`."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as lines of JSON, see `write_text`."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class DamagedFile(ValueError):
    """Raised for a file that does not hold what was written to it; the message quotes the file's content."""


CHECKSUM = "checksum"


def checksum(data: Any) -> str:
    """A hash of plain data, 16 hexadecimal digits, independent of the order of keys."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def write_checked(path: Path, data: dict[str, Any]) -> None:
    """Write plain data with its checksum, see `write_text`."""
    write_json(path, {**data, CHECKSUM: checksum(data)})


def read_checked(path: Path) -> dict[str, Any]:
    """Read what `write_checked` wrote.

    Args:
        path: The file.

    Returns:
        The data without its checksum.

    Raises:
        DamagedFile: If it is not a JSON object, or not what was written. A file without a checksum is accepted as it
            is.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise DamagedFile(f"{path} must hold a JSON object, and holds {shown(data)}.")
    told = data.pop(CHECKSUM, None)
    if told is not None and told != checksum(data):
        raise DamagedFile(f"{path} was changed after it was written: its checksum does not match its content.")
    return data


def read_json(path: Path) -> Any:
    """Read plain data from JSON.

    Args:
        path: The file.

    Returns:
        The data.

    Raises:
        DamagedFile: If it is not JSON; names the line.
    """
    return parse_json(_text(path), str(path))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read rows from lines of JSON.

    Args:
        path: The file.

    Returns:
        One mapping per line that is not empty.

    Raises:
        DamagedFile: If a line is not a JSON object; names the line and quotes it.
    """
    rows = []
    # Not splitlines: a text may contain U+0085 or U+2028, which JSON does not escape.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line:
            continue
        row = parse_json(line, f"{path}, line {number}")
        if not isinstance(row, dict):
            raise DamagedFile(f"{path}, line {number} must be a JSON object and is {shown(row)}.")
        rows.append(row)
    return rows


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file written by other software, such as a configuration.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        DamagedFile: If it is empty, cut off, not UTF-8, not JSON, nested too deeply, or not an object; the
            message names the file and what it contains.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DamagedFile(
            f"{path} is not UTF-8 text (byte {error.start}), so it is not JSON. Save it again."
        ) from error
    except RecursionError:
        raise DamagedFile(f"{path} is JSON nested too deeply to be read. Save it again.") from None
    except ValueError as error:
        raise DamagedFile(f"{path} is not JSON: {error}. It was cut off or edited; save it again.") from error
    if not isinstance(found, dict):
        raise DamagedFile(f"{path} holds a JSON {type(found).__name__} where an object is expected. Save it again.")
    return found


def parse_json(text: str, place: str, unique: bool = False) -> Any:
    """Parse JSON from a text.

    Args:
        text: The text.
        place: Where it comes from, for the message.
        unique: Whether to refuse an object that gives a key twice.

    Returns:
        The data.

    Raises:
        DamagedFile: If it is not JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique if unique else None)
    except json.JSONDecodeError as error:
        at = f", line {error.lineno}" if "\n" in text.strip() else ""
        begin = max(error.pos - 30, 0)
        found = f"it contains {text[begin : error.pos + 30]!r}" if text.strip() else "it is empty"
        raise DamagedFile(
            f"{place}{at}: not valid JSON ({error.msg.lower()}, column {error.colno}); {found}."
        ) from error
    except RecursionError as error:
        raise DamagedFile(f"{place}: its JSON is nested too deeply to be read.") from error
    except ValueError as error:  # a number with more digits than Python converts
        raise DamagedFile(f"{place}: not valid JSON ({error}).") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is given twice")
    return found


def shown(value: Any, length: int = 60) -> str:
    """Quote a value for a message: its kind, and its beginning."""
    kinds = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
    }
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = text if len(text) <= length else text[: length - 3] + "..."
    return "null" if value is None else f"{kinds.get(type(value), type(value).__name__)}, {text}"


def _text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DamagedFile(
            f"{path}, line {line}: the byte 0x{raw[error.start]:02x} at offset {error.start} is not UTF-8."
        ) from error
