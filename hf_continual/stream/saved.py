"""The fingerprint of a saved model: digests of the files that it is loaded from, wherever its folder is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from hf_continual.atomic_files import DamagedFile, checksum, read_object
from hf_continual.hub.folder_facts import ADAPTER

# Keys that a push writes into an adapter's configuration: where its base is, not what the adapter is.
_PLACE = ("base_model_name_or_path", "revision")
_WHOLE, _PIECE, _PIECES = 2**23, 2**16, 64


def saved_files(folder: Path) -> dict[str, str]:
    """Digests of the weights and configurations of a folder, and of the models in its subfolders.

    Args:
        folder: The folder of a model or of a task.

    Returns:
        Digest by path in the folder. Files of more than 8 MiB are read at 64 places, not completely: a model that
        was trained further, or truncated, differs there.
    """
    return {file.relative_to(folder).as_posix(): _digest(file) for file in _files(folder)}


def _files(folder: Path) -> Iterator[Path]:
    for place in (folder, *sorted(p for p in folder.iterdir() if p.is_dir() and _holds_a_model(p))):
        yield from (f for f in sorted(place.glob("*.safetensors")) if f.is_file())
        yield from (place / name for name in ("config.json", ADAPTER) if (place / name).is_file())


def _holds_a_model(folder: Path) -> bool:
    return folder.name != "continual" and not folder.name.startswith(("checkpoint-", ".", "plots"))


def _digest(file: Path) -> str:
    if file.name == ADAPTER:
        return checksum({k: v for k, v in read_object(file).items() if k not in _PLACE})
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        if size <= _WHOLE:
            digest.update(opened.read())
        else:
            for i in range(_PIECES):
                opened.seek(i * (size - _PIECE) // (_PIECES - 1))
                digest.update(opened.read(_PIECE))
    return digest.hexdigest()[:16]


def changed_files(then: Mapping[str, str], folder: Path) -> list[str]:
    """List the recorded files that have changed.

    Args:
        then: What `saved_files` returned.
        folder: The folder now.

    Returns:
        A few words per file, such as ``"config.json was changed"``.
    """
    try:
        now = saved_files(folder)
    except (DamagedFile, OSError) as error:
        return [str(error)]
    gone = [f"{name} is missing" for name in then if name not in now]
    new = [f"{name} was added" for name in now if name not in then and "/" not in name]
    return [*gone, *(f"{name} was changed" for name in then if now.get(name, then[name]) != then[name]), *new]
