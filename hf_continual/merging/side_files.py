"""The files beside the weights: copied byte for byte, but for a configuration that has to say something new."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_continual.durable import write_text
from hf_continual.merging.checkpoints import ADAPTER_CONFIG, CONFIG, Checkpoint
from hf_continual.merging.checks import tokenizer_folder
from hf_continual.merging.members import Member

_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
_TOKENIZER_ENDINGS = (".model", ".tiktoken", ".spm")


def side_files(reference: Checkpoint, newest: Member, model: bool) -> dict[str, Path]:
    """Which files are copied from where.

    Args:
        reference: The model that gives configuration and generation configuration.
        newest: The model that gives tokenizer and chat template.
        model: Whether the output is a full model.

    Returns:
        Name in the output -> source.
    """
    folder = tokenizer_folder(newest)
    found = {
        p.name: p
        for p in sorted(folder.iterdir())
        if p.is_file() and (p.name in _TOKENIZER or p.suffix in _TOKENIZER_ENDINGS)
    }
    if (folder / "additional_chat_templates").is_dir():
        found |= {f"additional_chat_templates/{p.name}": p for p in (folder / "additional_chat_templates").iterdir()}
    if model:
        for path in (reference.folder / "generation_config.json", *sorted(reference.folder.glob("*.py"))):
            # Code that a configuration's auto_map points to goes with it.
            if path.is_file() and (path.suffix != ".py" or reference.config.get("auto_map")):
                found[path.name] = path
    return found


def write_side_files(
    out: Path, files: Mapping[str, Path], config: Mapping[str, Any], original: Path | None, adapter: bool
) -> None:
    """Copy the files, and write the configuration.

    Args:
        out: The output folder.
        files: Name in the output -> source.
        config: The configuration.
        original: File that already says just that, to be copied byte for byte, or None.
        adapter: Whether it is an adapter's configuration.
    """
    for name, source in files.items():
        copy(source, out / name)
    target = out / (ADAPTER_CONFIG if adapter else CONFIG)
    if original is not None:
        copy(original, target)
    else:
        write_text(target, json.dumps(config, indent=2, sort_keys=adapter, ensure_ascii=False) + "\n")


def copy(source: Path, target: Path) -> None:
    """Copy a file's bytes and put them on the disk; who may read it is left to the umask."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, target.open("wb") as written:
        shutil.copyfileobj(read, written)
        written.flush()
        os.fsync(written.fileno())
