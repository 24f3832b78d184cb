"""From a name to a folder: a folder stays what it is, a Hub id is downloaded into the cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_WANTED = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "*.codes",
    "*.py",
    "README.md",
]
# Other formats of the same weights, kept beside them; of folders only that of further chat templates.
_UNWANTED = [
    "*/*.safetensors",
    "*/*.json",
    "*/*.txt",
    "*/*.model",
    "*/*.tiktoken",
    "*/*.spm",
    "*/*.codes",
    "*/*.py",
    "*/README.md",
    "consolidated*",
]


def fetch(model: str | os.PathLike[str]) -> tuple[Path, str | None, str | None]:
    """The folder of a model.

    Args:
        model: A folder, or a Hub id such as ``"me/model"`` or ``"me/model@revision"``.

    Returns:
        The folder, the Hub id and the commit (both None for a folder).

    Raises:
        FileNotFoundError: If it is no folder and cannot be a Hub id.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder, None, None
    hub_id, _, revision = str(model).partition("@")
    if not _ID.match(hub_id) or hub_id.startswith("."):
        raise FileNotFoundError(
            f"{str(model)!r} is no folder, and no Hub id such as 'me/model' or 'me/model@revision'."
        )
    from huggingface_hub import snapshot_download  # imported when asked for: a merge of folders needs no network code

    found = Path(
        snapshot_download(hub_id, revision=revision or None, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
    )
    return found, hub_id, found.name
