"""Which files hold a model's weights: those that ``from_pretrained`` loads, and only files of the folder itself.

An index comes from whoever made the model. A name in it may lead to any file of this machine (``../``, an absolute
path), so names that are more than a file's name are refused before anything is opened.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from hf_continual.atomic_files import read_object

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_ENDING = ".safetensors"


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a full model, as ``from_pretrained`` chooses them.

    The single file goes before an index, also before an index that is newer.

    Args:
        folder: The model's folder.

    Returns:
        Its files, which need not be there; of a folder without an index, the place of the single file.

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
    """Which file an index says holds which tensor.

    Args:
        index: The ``*.safetensors.index.json``.

    Returns:
        Name of a tensor -> name of a file beside the index.

    Raises:
        ValueError: If it is damaged, or a name is more than a file's name.
    """
    found: Any = read_object(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{index} has no weight_map that says which file holds which tensor. Save the model again.")
    for tensor, file in found.items():
        if not is_file_name(file):
            raise ValueError(
                f"{index} says that {tensor!r} is in {file!r}. Only the names of {_ENDING} files in the same folder are read, "
                f"never a path to elsewhere. Do not use this model unless you know who wrote that; save it again."
            )
    return found


def is_file_name(name: object) -> bool:
    """Whether this is the plain name of a safetensors file, on every system: no path, no drive, no control character."""
    if not isinstance(name, str) or not name.endswith(_ENDING) or not name.isprintable():
        return False
    return name == PurePosixPath(name).name == PureWindowsPath(name).name
