"""Find the files that hold a model's weights: those that ``from_pretrained`` loads, inside the folder only.

An index comes from the model's author. A name in it may point to any file on this machine (``../``, an absolute
path), so anything but a plain file name is refused before a file is opened.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from hf_continual.atomic_files import read_object

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_ENDING = ".safetensors"


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a full model, as ``from_pretrained`` chooses them.

    The single file takes precedence over an index, even over a newer one.

    Args:
        folder: The model's folder.

    Returns:
        Its files, which may be missing; without an index, the path of the single file.

    Raises:
        ValueError: If the index is damaged, or names a file outside the folder.
    """
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [folder / WEIGHTS]
    return [folder / name for name in dict.fromkeys(weight_map(folder / INDEX).values())]


def unused_index(folder: Path) -> Path | None:
    """The index that ``from_pretrained`` ignores because the single file is there too, or None."""
    index = folder / INDEX
    return index if index.is_file() and (folder / WEIGHTS).is_file() else None


def weight_map(index: Path) -> dict[str, str]:
    """Read from an index which file holds each tensor.

    Args:
        index: The ``*.safetensors.index.json``.

    Returns:
        Name of a tensor -> name of a file next to the index.

    Raises:
        ValueError: If it is damaged, or a name is not a plain file name.
    """
    found: Any = read_object(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{index} has no weight_map that says which file holds which tensor. Save the model again.")
    for tensor, file in found.items():
        if not is_file_name(file):
            raise ValueError(
                f"{index} says that {tensor!r} is in {file!r}. Only the names of {_ENDING} files in the same folder are read, "
                f"never a path elsewhere. Do not use this model unless you know who wrote that; save it again."
            )
    return found


def is_file_name(name: object) -> bool:
    """Whether this is the plain name of a safetensors file, on every system: no path, no drive, no control character."""
    if not isinstance(name, str) or not name.endswith(_ENDING) or not name.isprintable():
        return False
    return name == PurePosixPath(name).name == PureWindowsPath(name).name
