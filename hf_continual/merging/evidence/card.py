"""The card of a merge, from the merge's own report and from what its inputs say about themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_continual.hub.facts import CardFacts, MergeFacts, TaskFacts
from hf_continual.hub.files import installed_versions, write_card
from hf_continual.hub.folder_facts import has_chat, has_facts, read_facts
from hf_continual.hub.licences import with_license
from hf_continual.hub.refs import UNKNOWN, ModelRef, model_ref
from hf_continual.merging.inputs.quantization import known_quantization

if TYPE_CHECKING:
    from hf_continual.merging.engine.job import Job
    from hf_continual.merging.inputs.checkpoint import Checkpoint


def write_merge_card(out: Path, job: Job, report: Mapping[str, Any], name: str, license: str | None = None) -> None:
    """Write card, configuration and results next to a merged model.

    Args:
        out: The folder with the merged model and its report.
        job: The merge.
        report: The report.
        name: Name of the model; the folder's name is temporary.
        license: Its licence, if the user chose it.
    """
    facts = merge_facts(out, job, report, name)
    write_card(out, facts if license is None else with_license(facts, license))


def merge_facts(out: Path, job: Job, report: Mapping[str, Any], name: str) -> CardFacts:
    """The facts of a merge; see `write_merge_card`."""
    inputs = tuple(_ref(member.own) for member in job.members)
    weights = report.get("weights")
    merge = MergeFacts(
        job.method,
        inputs,
        dict(report["options"]),
        job.paper,
        weights if isinstance(weights, Mapping) else None,
        job.image if job.image is not None and (out / job.image).is_file() else None,
        job.report,
        notes=tuple(report.get("notes", ())),
    )
    adapter = report["kind"] == "adapter"
    return CardFacts(
        name,
        adapter=_adapter(job, report) if adapter else {},
        kind="adapter" if adapter else "model",
        base=_base(job, adapter),
        tasks=_tasks(job),
        merge=merge,
        chat=has_chat(out),
        versions=installed_versions(),
    )


def _adapter(job: Job, report: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a merged adapter; how its base was quantised is kept where all inputs agree."""
    known = [known_quantization(m.own) for m in job.members if m.own.is_adapter]
    same = known and known[0] is not None and all(k == known[0] for k in known)
    return {"r": report["rank"], **({"quantization": dict(known[0].raw)} if same and known[0] is not None else {})}


def _ref(checkpoint: Checkpoint) -> ModelRef:
    if checkpoint.hub_id is not None:
        found = model_ref(checkpoint.folder)
        return ModelRef(checkpoint.hub_id, checkpoint.revision, found.license)
    return model_ref(checkpoint.folder, name=checkpoint.name)


def _base(job: Job, adapter: bool) -> ModelRef:
    """For an adapter, the model that it belongs to; else the root of the lineage, as far as it is known."""
    given = job.base or next((m.checkpoint for m in job.members if m.adapter is not None), None)
    if given is not None and adapter:
        return _ref(given)
    for checkpoint in (given, *(m.own for m in job.members)):
        if checkpoint is not None and has_facts(checkpoint.folder):
            root = read_facts(checkpoint.folder).base
            if root != UNKNOWN:
                return root
    return UNKNOWN if given is None else _ref(given)


def _tasks(job: Job) -> tuple[TaskFacts, ...]:
    """The tasks that the inputs learned, each once, oldest first."""
    found: dict[str, TaskFacts] = {}
    for member in job.members:
        folder = member.own.folder
        learned = read_facts(folder).tasks if has_facts(folder) else ()
        for i, task in enumerate(learned):
            last = i == len(learned) - 1
            found.setdefault(task.name, replace(task, checkpoint=_ref(member.own)) if last else task)
    return tuple(found.values())
