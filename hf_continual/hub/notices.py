"""LICENSE and NOTICE files of the parents, copied along with what was made from them."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path

from hf_continual.hub.preflight import Target

NAMES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def copy_notices(target: Target, folder: Path) -> list[str]:
    """Copy the licence files of the published parents into a folder that does not have them.

    Args:
        target: Where to push; `bases` states which files the parents have.
        folder: The model's folder.

    Returns:
        The names that were copied.
    """
    copied = []
    for hub_id, info in target.bases.items():
        for name in sorted(s.rfilename for s in info.siblings or []):
            if any(fnmatch.fnmatch(name, pattern) for pattern in NAMES) and not (folder / name).exists():
                found = target.ask(
                    lambda hub_id=hub_id, name=name, sha=info.sha: target.api.hf_hub_download(
                        hub_id, name, revision=sha
                    ),
                    f"reading {name} of {hub_id}",
                )
                shutil.copyfile(found, folder / name)
                copied.append(name)
    return copied
