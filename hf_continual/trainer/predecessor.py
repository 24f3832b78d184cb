"""Where the weights of a run come from, and what methods of the previous task left with them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
)
from peft import PeftModel

from hf_continual import private
from hf_continual.data import handover
from hf_continual.tensors.reference import untrained

logger = logging.getLogger(__name__)


def named_by(model: Any) -> str | None:
    """Where the weights of a loaded model come from, if recorded; PEFT does not record an adapter's folder."""
    if isinstance(model, PeftModel) and not untrained(model):
        return None
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return getattr(base.config, "name_or_path", None) or None


def find_predecessor(source: str | None, revision: str | None, check: bool = True) -> handover.HandOver | None:
    """Find what the methods of the previous task left with the weights that training starts from.

    Args:
        source: Folder or Hub id of the weights.
        revision: Commit, branch or tag of a Hub id.
        check: Whether to compare weight files with the ones it was saved with.

    Returns:
        The list of what was left; None if there is none.

    Raises:
        HandOverError: If it is damaged, or belongs to different weights.
    """
    if source is None:
        return None
    folder = Path(source).expanduser()
    if folder.is_dir():
        return handover.read(folder, check)
    if source.count("/") > 1 or source.startswith((".", "~", "/")):
        return None
    listed = f"{handover.FOLDER}/{handover.MANIFEST}"
    if private.is_known_absent(source, listed, revision):
        return None
    try:
        hf_hub_download(source, listed, revision=revision)
        patterns = [f"{handover.FOLDER}/*", "*.safetensors"]
        return handover.read(Path(snapshot_download(source, revision=revision, allow_patterns=patterns)), check)
    except RemoteEntryNotFoundError:
        return None
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        logger.warning(
            "%s: could not find out from the Hub whether methods of an earlier task left something there (%s); training starts "
            "without it. To be sure, download the repository and give its folder.", source, type(error).__name__,
        )  # fmt: skip
        return None


def is_unfinished(source: str | None) -> bool:
    """Whether the weights are a checkpoint of an unfinished task, which leaves nothing to a next task."""
    return source is not None and (Path(source) / handover.FOLDER / "run.json").is_file()
