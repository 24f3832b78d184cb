"""The checkpoints of a diagnosis: which they are, and one of them in memory at a time."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_continual.hub.damaged import not_found
from hf_continual.merging.inputs.checkpoint import Checkpoint, open_checkpoint
from hf_continual.merging.inputs.members import Member, open_members
from hf_continual.merging.inputs.run_model import load_tokenizer
from hf_continual.paths import check_is_there

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Patients:
    """The checkpoints.

    Args:
        before: Before the new training.
        after: After it.
        base: What BEFORE was trained from, for the control and the angles; None: not known.
    """

    before: Member
    after: Member
    base: Member | None

    @property
    def tokenizer(self) -> Any:
        """AFTER's tokenizer, or its base's."""
        return load_tokenizer(self.after)


def open_patients(before: Source, after: Source, base: Source | None = None) -> Patients:
    """Open full models and adapters; no weights are read.

    Args:
        before: Folder or Hub id of a model or adapter.
        after: Another. An adapter after a full model sits on that model, unless it names another base than an adapter before.
        base: Full model that BEFORE was trained from; by default what BEFORE, if it is an adapter, names as its base.

    Returns:
        The checkpoints.

    Raises:
        ValueError: If the base is an adapter.
        FileNotFoundError: If one is neither a folder here nor a name that the Hub or its cache knows.
    """
    first, last = _opened(before, "the model before"), _opened(after, "the model after")
    below = None if base is None else str(base)
    if base is not None:
        _opened(base, "the base")
    if below is None and first.is_adapter:
        below = first.config.get("base_model_name_or_path")
    opened_before, full = open_members([before], below)
    under = below if first.is_adapter else str(before)
    opened_after, _ = open_members([after], under if last.is_adapter else None)
    return Patients(opened_before[0], opened_after[0], None if full is None else Member(full))


def _opened(source: Source, what: str) -> Checkpoint:
    check_is_there(source, what)
    try:
        return open_checkpoint(source)
    except OSError as error:
        if missing := not_found(source, what, error):
            raise FileNotFoundError(missing) from error
        raise


@contextmanager
def in_memory(member: Member, device: str | None = None) -> Iterator[Any]:
    """A model in fp32, within the ``with``, in evaluation mode; its adapter is trainable.

    Args:
        member: Full model, or base with adapter.
        device: Where; by default the accelerator if there is one.

    Yields:
        The model.
    """
    model = AutoModelForCausalLM.from_pretrained(member.checkpoint.folder, dtype=torch.float32)
    if member.adapter is not None:
        model = PeftModel.from_pretrained(model, member.adapter.checkpoint.folder, is_trainable=True)
    yield from _placed(model, device)


@contextmanager
def fresh(patients: Patients, seed: int, device: str | None = None) -> Iterator[Any]:
    """The control before its training: BEFORE's base, with a new adapter of AFTER's kind where AFTER is an adapter."""
    assert patients.base is not None
    model = AutoModelForCausalLM.from_pretrained(patients.base.checkpoint.folder, dtype=torch.float32)
    if patients.after.adapter is not None:
        config = PeftConfig.from_pretrained(str(patients.after.adapter.checkpoint.folder))
        config.inference_mode = False
        torch.manual_seed(seed)
        model = get_peft_model(model, config)
    yield from _placed(model, device)


def _placed(model: Any, device: str | None) -> Iterator[Any]:
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        yield model.to(where).eval()
    finally:
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
