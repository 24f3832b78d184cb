"""Files that are whole or absent, whatever moment a process is killed at."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and put it there in one step, after its bytes are on the disk."""
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


def read_json(path: Path) -> Any:
    """Read plain data from JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read rows from lines of JSON."""
    # Not splitlines: a text may hold U+0085 or U+2028, which JSON leaves as they are.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that somebody else wrote and that holds an object, such as a configuration.

    Args:
        path: The file.

    Returns:
        What it holds.

    Raises:
        ValueError: If it is empty, cut off, not UTF-8, not JSON, nested too deeply, or holds something else; the
            message names the file and what was met.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}), so it is not JSON. Save it again.") from error
    except RecursionError:
        raise ValueError(f"{path} is JSON nested too deeply to be read. Save it again.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. It was cut off or edited; save it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a JSON {type(found).__name__} where an object is expected. Save it again.")
    return found
