"""State that the methods of a finished task leave for the next one, on disk next to the model they learned it with.

``continual/NAME.safetensors`` and ``continual/NAME.json`` hold what method NAME returned from `task_state`;
``continual/methods.json``, written last, lists them with their checksums and with those of the weight files. A model
whose saving was interrupted can therefore be told from a complete one: both are there, the weights and what was learned
with them, or the folder is refused.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_continual.atomic_files import read_json, write_json
from hf_continual.data.kept import (
    AGAIN,
    FOLDER,
    FORMAT,
    MANIFEST,
    STAGED,
    HandOver,
    HandOverError,
    Kept,
    file_facts,
    weight_files,
)

logger = logging.getLogger(__name__)

__all__ = [
    "FOLDER",
    "MANIFEST",
    "HandOver",
    "HandOverError",
    "Kept",
    "bring_along",
    "check_files",
    "clear",
    "commit",
    "read",
    "stage",
    "state_of",
    "unpublished",
]


def stage(
    folder: Path,
    states: Mapping[str, Mapping[str, Any]],
    described: Sequence[tuple[str, str, Mapping[str, Any]]],
    task: Mapping[str, Any],
    base: Mapping[str, Any],
    words: Mapping[str, str] | None = None,
    with_rows: Collection[str] = (),
) -> None:
    """Write what methods leave to a staging folder before the model is saved; `commit` moves it into place after.

    Args:
        folder: The model's folder.
        states: What each method leaves, by name; values are tensors or plain data. Empty ones leave no file.
        described: ``(name, kind, hyper-parameters)`` of each method.
        task: Name and index of the task.
        base: Facts about the weights below an adapter.
        words: A description of what each method leaves, by its name.
        with_rows: Names of the methods whose state holds rows of data.
    """
    room = folder / FOLDER / STAGED
    if room.exists():
        shutil.rmtree(room)
    room.mkdir(parents=True)
    kept = []
    for name, kind, options in described:
        if state := states.get(name):
            files, tensors = _write_state(room, name, state)
            what = (words or {}).get(name, "")
            kept.append(
                {"name": name, "kind": kind, "what": what, "options": options, "files": files, "tensors": tensors}
                | ({"rows": True} if name in with_rows else {})
            )
    write_json(room / MANIFEST, {"format": FORMAT, "task": dict(task), "base": dict(base), "methods": kept})


def _write_state(room: Path, name: str, state: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items() if torch.is_tensor(v)}
    plain = {k: v for k, v in state.items() if not torch.is_tensor(v)}
    files = {}
    if tensors:
        save_file(tensors, room / f"{name}.safetensors", metadata={"format": "pt"})
        files[f"{name}.safetensors"] = file_facts(room / f"{name}.safetensors")
    if plain:
        write_json(room / f"{name}.json", plain)
        files[f"{name}.json"] = file_facts(room / f"{name}.json")
    return files, len(tensors)


def commit(folder: Path) -> None:
    """Move the staged files into place, bound to the weights that are in the folder now."""
    home = folder / FOLDER
    room = home / STAGED
    manifest: dict[str, Any] = {
        **read_json(room / MANIFEST),
        "weights": {file.name: file_facts(file) for file in weight_files(folder)},
    }
    # From here until the new list is written, the folder counts as unfinished.
    (home / MANIFEST).unlink(missing_ok=True)
    for kept in manifest["methods"]:
        for name in kept["files"]:
            if kept.get("rows") and not (room / name).is_file():
                continue  # rows that did not come with the model that is brought along
            (room / name).replace(home / name)
    write_json(home / MANIFEST, manifest)
    shutil.rmtree(room)


def read(folder: Path, check_weights: bool = True) -> HandOver | None:
    """Read what the methods left in the folder of a finished task.

    Args:
        folder: Folder of a model or an adapter.
        check_weights: Whether the weight files must be the ones it was saved with.

    Returns:
        The list, with no tensor read; None if no method left anything.

    Raises:
        HandOverError: If the list cannot be read, or the folder holds different weights.
    """
    file = folder / FOLDER / MANIFEST
    if not file.is_file():
        if (folder / FOLDER / STAGED).is_dir():
            raise HandOverError(
                f"{folder} was being saved when the process ended: the model may be there, but what its methods learned is "
                f"not. {AGAIN}"
            )
        return None
    try:
        data = read_json(file)
        methods = tuple(
            Kept(
                str(m["name"]),
                str(m["kind"]),
                dict(m["options"]),
                _plain_names(m["files"], file),
                int(m["tensors"]),
                str(m.get("what", "")),
                bool(m.get("rows", False)),
            )
            for m in data["methods"]
        )
        found = HandOver(folder, dict(data["task"]), methods, _plain_names(data["weights"], file), dict(data["base"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, HandOverError):
            raise
        raise HandOverError(
            f"{file} is damaged ({type(error).__name__}: {error}). It lists what the methods learned. {AGAIN}"
        ) from error
    if check_weights:
        _check_weights(found)
    return found


def _plain_names(files: Mapping[str, Any], where: Path) -> dict[str, dict[str, Any]]:
    """Names of files in this folder; a list from someone else must not point outside it."""
    for name in files:
        if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise HandOverError(f"{where} lists the file {name!r}, which is not the name of a file in its folder.")
    return {name: dict(facts) for name, facts in files.items()}


def _check_weights(found: HandOver) -> None:
    for name, facts in found.weights.items():
        file = found.folder / name
        if not file.is_file() or file_facts(file) != facts:
            state = "is missing" if not file.is_file() else "has changed"
            raise HandOverError(
                f"{file} {state} since the methods {', '.join(found.names)} of task {found.task.get('name')!r} left what "
                f"they had learned with it: it no longer belongs to these weights. {AGAIN}"
            )


def check_files(found: HandOver) -> None:
    """Refuse files that are missing or differ from what was written.

    Args:
        found: The list.

    Raises:
        HandOverError: Naming the file.
    """
    for kept in found.methods:
        for name, facts in ({} if unpublished(found, kept) else kept.files).items():
            _check_file(found.folder / FOLDER / name, facts, kept.name)


def unpublished(found: HandOver, kept: Kept) -> bool:
    """Whether what a method left are rows of data that did not come with the model.

    Args:
        found: The list.
        kept: The method's entry in it.

    Returns:
        True only if none of its files is there: some of them without the others are damage.
    """
    return kept.rows and not any((found.folder / FOLDER / name).is_file() for name in kept.files)


def _check_file(file: Path, facts: Mapping[str, Any], name: str) -> None:
    if not file.is_file():
        raise HandOverError(f"{file} is missing; it holds what method {name!r} learned. {AGAIN}")
    if file_facts(file) != facts:
        raise HandOverError(f"{file} is damaged: its checksum differs from that in {MANIFEST}. {AGAIN}")


def state_of(found: HandOver, name: str) -> dict[str, Any]:
    """Load what one method left.

    Args:
        found: The list.
        name: Name of the method.

    Returns:
        Tensors on the host and plain data by key; empty if it left nothing.

    Raises:
        HandOverError: If a file is missing or damaged.
    """
    if found.held is not None:
        return dict(found.held.get(name, {}))
    kept = next((k for k in found.methods if k.name == name), None)
    state: dict[str, Any] = {}
    if kept is not None and unpublished(found, kept):
        logger.warning(
            "%s: the rows that method %r kept did not come with the model, so it starts without them. Where they are, push them "
            "by name (--include %s/%s).", found.folder, name, FOLDER, next(iter(kept.files), ""),
        )  # fmt: skip
        return state
    for file_name, facts in ({} if kept is None else kept.files).items():
        file = found.folder / FOLDER / file_name
        _check_file(file, facts, name)
        try:
            state |= load_file(file) if file.suffix == ".safetensors" else json.loads(file.read_text(encoding="utf-8"))
        except (SafetensorError, ValueError) as error:
            raise HandOverError(f"{file} cannot be read ({type(error).__name__}: {error}). {AGAIN}") from error
    return state


def bring_along(source: Path, target: Path) -> None:
    """Copy what methods left into another folder, bound to the weights there.

    For a model that was merged or stacked after it was trained: what was learned goes with the result.

    Args:
        source: Folder that it was saved in.
        target: Folder of the model it belongs to; earlier files there are replaced.
    """
    found = read(source)
    if found is None:
        return
    room = target / FOLDER / STAGED
    if room.exists():
        shutil.rmtree(room)
    room.mkdir(parents=True)
    for kept in found.methods:
        for name in () if unpublished(found, kept) else kept.files:
            shutil.copy2(source / FOLDER / name, room / name)
    manifest = {k: v for k, v in read_json(source / FOLDER / MANIFEST).items() if k != "weights"}
    if not (target / "adapter_config.json").is_file():
        manifest["base"] = {}  # a full model is its own base, whatever its parts were trained on
    write_json(room / MANIFEST, manifest)
    commit(target)


def clear(folder: Path) -> None:
    """Delete what an earlier save left: a model that is saved without it must not seem to have it."""
    home = folder / FOLDER
    (home / MANIFEST).unlink(missing_ok=True)
    if (home / STAGED).is_dir():
        shutil.rmtree(home / STAGED)
