"""The report of a merged output: what it was made from, so that the same call reproduces the same bytes."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hf_continual.merging.engine.options import Output
from hf_continual.merging.inputs.checkpoint import Checkpoint
from hf_continual.merging.inputs.members import Member
from hf_continual.merging.inputs.structure import head_name

if TYPE_CHECKING:
    from hf_continual.merging.engine.job import Job

SCHEMA = 1


def describe_job(job: Job, kind: str, rank: int | None, notes: list[str], options: Output) -> dict[str, Any]:
    """The facts of a merge as plain data: no local paths, no texts.

    Args:
        job: The merge.
        kind: ``"model"`` or ``"adapter"``.
        rank: Rank of an adapter output.
        notes: Notes for the user.
        options: How it is written.

    Returns:
        The report, without the facts that are known only after writing.
    """
    models = [describe_member(m, "base" if _is(m, job.base) else f"model {i}") for i, m in enumerate(job.members)]
    if job.base is not None and not any(_is(m, job.base) for m in job.members):
        models.insert(0, {**describe_checkpoint(job.base), "role": "base"})
    packages = ("hf-continual", "torch", "safetensors")
    return {
        "schema": SCHEMA,
        "method": job.method,
        "paper": {"title": job.paper.title, "url": job.paper.url},
        "kind": kind,
        "rank": rank,
        "models": models,
        "options": dict(job.options),
        "output_options": {k: getattr(options, k) for k in ("adapter_rank", "dtype", "max_shard_size", "vocab")},
        **job.facts,
        "notes": list(notes),
        "versions": {name: metadata.version(name) for name in packages},
    }


def _is(member: Member, base: Checkpoint | None) -> bool:
    return member.adapter is None and member.checkpoint is base


def describe_member(member: Member, role: str) -> dict[str, Any]:
    """One model of a report."""
    facts = {**describe_checkpoint(member.own), "role": role}
    if member.adapter is not None:
        config = member.adapter.checkpoint.config
        facts |= {"rank": config.get("r"), "alpha": config.get("lora_alpha"), "rslora": bool(config.get("use_rslora"))}
    else:
        facts["tied"] = head_name(member.checkpoint) is None
    return facts


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint by name, revision, licence, size and fingerprint."""
    return {
        "name": checkpoint.name,
        "hub_id": checkpoint.hub_id,
        "revision": checkpoint.revision,
        "kind": "adapter" if checkpoint.is_adapter else "model",
        "license": license_of(checkpoint.folder),
        "bytes": checkpoint.nbytes,
        "fingerprint": checkpoint.fingerprint,
        **({} if checkpoint.seen_as is None else {"seen_as": dict(checkpoint.seen_as)}),
    }


def license_of(folder: Path) -> str | None:
    """The licence that a model card states in its metadata, or None."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if not text.startswith("---"):
        return None
    try:
        data = yaml.safe_load(text[3:].partition("\n---")[0])
    except yaml.YAMLError:
        return None
    found = data.get("license") if isinstance(data, dict) else None
    return str(found) if found else None
