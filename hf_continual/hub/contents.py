"""Which files of a folder are pushed: a complete model, its card and evidence; nothing that executes or leaks."""

from __future__ import annotations

import fnmatch
import hashlib
import mmap
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hf_continual.data import handover
from hf_continual.hub.pictures import KINDS, linked_pictures
from hf_continual.hub.text import TOKEN
from hf_continual.tensors.weight_files import WEIGHTS as SINGLE
from hf_continual.tensors.weight_files import unused_index, weight_map

# An allow-list: files without a rule are not pushed, so that nothing new leaks.
WANTED = (
    "*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.md", "*.png",
    "*.py", "LICENSE*", "NOTICE*", "*.yaml", "plots/*.png", "chat_templates/*.jinja", "additional_chat_templates/*.jinja",
)  # fmt: skip
UNWANTED = (
    "trainer_state.json",
    "training_args*",
    "plan.json",
    ".*",
    "*.partial",
    "optimizer*",
    "scheduler*",
    "rng_state*",
)
# Weights in the root of a repository that would be loaded instead of, or along with, the pushed ones.
WEIGHTS = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_model.bin",
    "adapter_config.json", "training_args.bin",
)  # fmt: skip
# File types that may be added by name; no pickles, which run code when loaded.
BY_NAME = (".jsonl", ".json", ".safetensors", ".csv", ".tsv", ".parquet", ".txt", ".md", ".yaml", *KINDS)
_PIXELS = tuple(kind for kind in KINDS if kind != ".svg")
_LARGE_TEXT = 10 * 2**20


class IncompleteFolder(ValueError):
    """A folder that cannot be pushed in its current state."""


@dataclass
class Contents:
    """The files of a push, with their checksums.

    Args:
        folder: The folder.
        files: Path in the repository -> file.
        left_out: Files that are not pushed.
        seen: State of the files that were searched for tokens without a finding.
    """

    folder: Path
    files: dict[str, Path]
    left_out: tuple[str, ...] = ()
    seen: frozenset[tuple[str, int, int]] = frozenset()
    _digests: dict[tuple[str, str, int, int], str] = field(default_factory=dict)

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter."""
        return "adapter_config.json" in self.files

    @property
    def size(self) -> int:
        """Total bytes."""
        return sum(file.stat().st_size for file in self.files.values())

    def matches(self, name: str, sha256: str | None, blob: str | None) -> bool:
        """Whether a file equals a remote one: by sha256 for large storage, else by git's blob id."""
        return self._checksum(name, "sha1" if sha256 is None else "sha256") == (blob if sha256 is None else sha256)

    def _checksum(self, name: str, kind: str) -> str:
        """A checksum, computed once as long as the file does not change."""
        file = self.files[name]
        size = file.stat().st_size
        key = (kind, *_state(name, file))
        if key not in self._digests:
            head = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
            self._digests[key] = _digest(file, hashlib.sha256() if kind == "sha256" else head)
        return self._digests[key]


def _state(name: str, file: Path) -> tuple[str, int, int]:
    found = file.stat()
    return name, found.st_size, found.st_mtime_ns


def _digest(file: Path, digest: hashlib._Hash) -> str:
    with file.open("rb") as opened:
        while piece := opened.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


def collect(
    folder: Path,
    secrets: Iterable[str] = (),
    before: Contents | None = None,
    method_state: bool = True,
    include: Iterable[str] = (),
) -> Contents:
    """Collect the files to push.

    Args:
        folder: The folder.
        secrets: Values that must not occur in any file.
        before: The previous collection, whose checksums are reused for unchanged files.
        method_state: Whether to include the methods' state for the next task.
        include: Additional files, by their path in the folder, such as rows of data, which are never pushed by default.

    Returns:
        The files.

    Raises:
        IncompleteFolder: If there is no complete model, or two models, or a file contains an access token.
    """
    if not folder.is_dir():
        state = "is not a folder" if folder.exists() else f"does not exist (looked in {Path.cwd()})"
        raise IncompleteFolder(f"{folder} {state}. Give the folder of a saved model.")
    files, left_out, pictures = {}, [], linked_pictures(folder)
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = file.relative_to(folder).as_posix()
        wanted = any(_match(name, pattern) for pattern in WANTED)
        if name in pictures or (wanted and not any(fnmatch.fnmatch(file.name, pattern) for pattern in UNWANTED)):
            files[name] = file
        elif name.count("/") == 0:
            left_out.append(name)
    learned, rows = _learned(folder)
    files |= {name: file for name, file in learned.items() if name not in rows} if method_state else {}
    files |= {file.relative_to(folder).as_posix(): file for file in (_named(folder, name) for name in include)}
    kept_back = [folder / "continual" / "memory.jsonl", *learned.values()]
    left_out += [n for f in kept_back if (n := f.relative_to(folder).as_posix()) not in files and f.is_file()]
    _check_model(folder, files)
    seen = set() if before is None else before.seen
    states = {name: _state(name, file) for name, file in files.items()}
    _check_secrets({n: f for n, f in files.items() if states[n] not in seen}, [s for s in secrets if s])
    digests = {} if before is None else before._digests
    return Contents(folder, files, tuple(left_out), frozenset(states.values()), digests)


def _learned(folder: Path) -> tuple[dict[str, Path], set[str]]:
    """Method state, if it is complete and belongs to these weights; nothing else from its folder. And which of it are rows."""
    try:
        found = handover.read(folder)
        if found is None:
            return {}, set()
        handover.check_files(found)
    except handover.HandOverError as error:
        raise IncompleteFolder(str(error)) from error
    there = [kept for kept in found.methods if not handover.unpublished(found, kept)]
    files = {f"{handover.FOLDER}/{name}": kept.rows for kept in there for name in kept.files}
    names = {f"{handover.FOLDER}/{handover.MANIFEST}": False, **files}
    return {name: folder / name for name in names}, {name for name, rows in names.items() if rows}


def _named(folder: Path, name: str) -> Path:
    """A file that was requested by name."""
    file = Path(os.path.normpath(folder / name))
    if not file.is_relative_to(folder) or not file.resolve().is_relative_to(folder.resolve()) or not file.is_file():
        raise IncompleteFolder(f"include: {name!r} is not a file in {folder}. Give its path in the folder.")
    if file.suffix not in BY_NAME:
        raise IncompleteFolder(
            f"include: {name!r} may contain code that runs when it is loaded. Only {', '.join(BY_NAME)} can be pushed."
        )
    return file


def _match(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch.fnmatch(name, pattern)


def _where_models_are(folder: Path) -> str:
    """What to push instead of a folder without a model: a plan's run has its tasks one level below."""
    tasks = sorted(p for p in folder.glob("task-*") if p.is_dir() and not p.name.endswith(".partial"))
    if not tasks:
        return "Save the model there first."
    return f"It is the folder of a plan's run, whose models are in {', '.join(p.name for p in tasks)}: push {tasks[-1]}, the last one. "


def _check_model(folder: Path, files: dict[str, Path]) -> None:
    adapter, full = "adapter_config.json" in files, "config.json" in files
    weights = [n for n in files if n.endswith(".safetensors") and "/" not in n]
    models = [n for n in weights if not n.startswith("adapter_model")]
    if adapter and models:
        raise IncompleteFolder(
            f"{folder} holds both an adapter and full weights ({models[0]}): from_pretrained would follow adapter_config.json and "
            f"ignore the weights. Keep one of the two in a separate folder."
        )
    if adapter and "adapter_model.safetensors" not in files:
        raise IncompleteFolder(
            f"{folder} holds adapter_config.json but no adapter_model.safetensors. Save the adapter again."
        )
    if not adapter and not (full and weights):
        missing = "config.json" if not full else "a *.safetensors file"
        raise IncompleteFolder(
            f"{folder} does not hold a complete model: {missing} is missing. {_where_models_are(folder)}"
        )
    if not adapter and (unused := unused_index(folder)):
        raise IncompleteFolder(
            f"{folder} holds {SINGLE} and {unused.name}: from_pretrained would load {SINGLE} and ignore the index with its "
            f"files. Remove the old one."
        )
    for name in [n for n in files if n.endswith(".safetensors.index.json")]:
        try:
            shards = set(weight_map(files[name]).values())
        except ValueError as error:
            raise IncompleteFolder(str(error)) from error
        if lost := sorted(shards - set(files)):
            raise IncompleteFolder(
                f"{name} names {lost[0]}, which is not in {folder}: the model is incomplete. Save it again."
            )
    for name in weights:
        _check_whole(name, files[name])


def _check_whole(name: str, file: Path) -> None:
    """Refuse a safetensors file that was cut off or damaged, as the library does that everyone loads it with."""
    try:
        with safe_open(file, "np"):
            pass
    except (SafetensorError, OSError) as error:
        raise IncompleteFolder(
            f"{name} has {file.stat().st_size} bytes and is not a complete safetensors file ({error}): it was cut off or damaged. "
            f"Save the model again."
        ) from error


def _check_secrets(files: dict[str, Path], secrets: list[str]) -> None:
    for name, file in files.items():
        if file.stat().st_size == 0:
            continue
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = any(data.find(secret.encode()) >= 0 for secret in secrets)
            if not found and not name.lower().endswith((".safetensors", *_PIXELS)) and len(data) < _LARGE_TEXT:
                found = re.search(TOKEN, data[:].decode("utf-8", "replace")) is not None
        if found:
            raise IncompleteFolder(
                f"{name} contains an access token, which anyone could read in the repository. Remove it (and revoke it if "
                f"the file was ever shared)."
            )


def secrets_in_use(token: str | None) -> list[str]:
    """The tokens that a push uses."""
    return [s for s in (token, os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")) if s]
