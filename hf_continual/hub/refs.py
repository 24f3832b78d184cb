"""Names of models: Hub ids with their commit, and local folders, whose paths are never shown."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_continual.hub.published import read_published
from hf_continual.hub.text import split_card

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
HUB_ID = re.compile(rf"(?:{_PART}/)?{_PART}")
_SNAPSHOT = re.compile(r"models--(.+?)[/\\]snapshots[/\\]([0-9a-f]{40})(?:[/\\]|$)")


def is_hub_id(name: Any) -> bool:
    """Whether a name can be that of a Hub repository: ``name`` or ``namespace/name``, not a path."""
    return (
        isinstance(name, str)
        and HUB_ID.fullmatch(name) is not None
        and len(name) <= 96
        and ".." not in name
        and "--" not in name
        and not name.endswith(".git")
    )


@dataclass(frozen=True)
class ModelRef:
    """A model by its Hub id, or a local one without an id.

    Args:
        hub_id: Repository, or None for a model that is not published.
        revision: Commit, branch or tag.
        license: Licence that its card states.
        name: Name of a local model in the text; never a path.
    """

    hub_id: str | None = None
    revision: str | None = None
    license: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.hub_id is not None and not is_hub_id(self.hub_id):
            raise ValueError(
                f"{self.hub_id!r} is not a valid Hub id such as 'me/model'. A local model has hub_id=None and its own name."
            )

    @property
    def shown(self) -> str:
        """As text: a link with the commit, or the local name."""
        if self.hub_id is None:
            return f"{self.name or 'a local model'} (local, not published)"
        commit = f" ({self.revision[:7]})" if self.revision else ""
        return f"[{self.hub_id}](https://huggingface.co/{self.hub_id}){commit}"


UNKNOWN = ModelRef()


def model_ref(path: str | os.PathLike[str] | None, revision: str | None = None, name: str | None = None) -> ModelRef:
    """Resolve a path or id: a Hub id, a folder of the Hub cache, a folder that was pushed, or a local folder.

    Args:
        path: The source of a model.
        revision: Revision it was loaded at.
        name: Its name if it is local.

    Returns:
        The reference; holds no path.
    """
    text = "" if path is None else os.fspath(path)
    if not text:
        return ModelRef(name=name)
    if found := _SNAPSHOT.search(text):
        hub_id = found[1].replace("--", "/")
        return ModelRef(hub_id, found[2], license_in(Path(text)))
    folder = Path(text)
    if folder.is_dir():
        pushed = read_published(folder)
        return ModelRef(
            pushed.get("repo_id"), pushed.get("revision"), license_in(folder), name or folder.resolve().name
        )
    return ModelRef(text, revision) if is_hub_id(text) else ModelRef(name=name or folder.name)


def loaded_ref(path: str | os.PathLike[str] | None, revision: str | None = None, name: str | None = None) -> ModelRef:
    """Like `model_ref`, for a model that was just loaded: the commit is the one in the cache."""
    ref = model_ref(path, revision, name)
    if ref.hub_id is None or (ref.revision and len(ref.revision) == 40):
        return ref
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(ref.hub_id, "config.json", revision=revision)
    found = _SNAPSHOT.search(file) if isinstance(file, str) else None
    return ref if found is None else replace(ref, revision=found[2], license=license_in(Path(file).parent))  # pyrefly: ignore


def license_in(folder: Path) -> str | None:
    """The licence that a folder's card states, or None."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    found = split_card(card.read_text(encoding="utf-8", errors="replace"))[0].get("license")
    return found if isinstance(found, str) else None
