"""The pipeline of every merge: open, compare, plan, make passes, write, report, publish."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_continual.atomic_files import DamagedFile, read_json, write_json
from hf_continual.merging.engine.average import Average
from hf_continual.merging.engine.job import Job
from hf_continual.merging.engine.layout import Layout, lay_out
from hf_continual.merging.engine.options import Output, read_output
from hf_continual.merging.engine.passes import Passes
from hf_continual.merging.engine.plan import MergePlan, check_disk, show_plan
from hf_continual.merging.engine.progress import bytes_bar
from hf_continual.merging.engine.result import MergeResult
from hf_continual.merging.engine.rules import Rules
from hf_continual.merging.engine.shards import index_of
from hf_continual.merging.engine.side_files import SideFiles, write_side_files
from hf_continual.merging.engine.staging import CACHE, FOUND, Staging, check_free, locked, staging_folder
from hf_continual.merging.engine.writer import write_shards
from hf_continual.merging.evidence.card import write_merge_card
from hf_continual.merging.evidence.publishing import check_push, push
from hf_continual.merging.evidence.report import describe_job
from hf_continual.merging.inputs.architecture import check_whole
from hf_continual.merging.inputs.checkpoint import INDEX
from hf_continual.merging.inputs.compatibility import check_tokenizers, warn_alone, warn_identical
from hf_continual.merging.inputs.configs import check_configs
from hf_continual.merging.inputs.members import check_list
from hf_continual.merging.protocol import MergeMethod, Models

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """A merge that passed every check of its inputs; nothing is written yet.

    Args:
        method: A fresh copy of the method, without results of an earlier merge by the same object.
        models: The models of the merge.
        target: Where the result goes.
        options: How it is written.
        job: The merge as plain data; for a method that makes passes, before it has made them.
        plan: What will be written.
        seconds: Wall time of planning.
    """

    method: MergeMethod
    models: Models
    target: Path
    options: Output
    job: Job
    plan: MergePlan
    seconds: float

    def finished(self) -> dict[str, Any] | None:
        """The report of a finished merge of the same models with the same request, or None."""
        if not self.options.resume or not (self.target / self.job.report).is_file():
            return None
        found = read_json(self.target / self.job.report)
        # Reports of earlier versions have no "asked"; with the same plan it is the same merge.
        same = found.get("asked") == self.plan.asked or found.get("plan") == self.plan.identity
        whole = same and all(
            (self.target / name).is_file() and (self.target / name).stat().st_size == facts["size"]
            for name, facts in found.get("files", {}).items()
        )
        return found if whole else None

    def check(self) -> None:
        """Check that the output folder is free, the disk large enough, and a push possible."""
        check_free(self.target, self.options.overwrite)
        if not (staging_folder(self.target) / "out").exists():
            check_disk(self.plan, self.target)
        check_push(self.job, self.options, self.plan.layout.kind)

    def result(self, report: Mapping[str, Any], **seconds: float) -> MergeResult:
        """The result for the caller."""
        layout, plan = self.plan.layout, self.plan
        done = MergeResult(
            self.target, self.job.method, self.job.paper, layout.kind, layout.rank, report, plan.bytes_read,
            plan.bytes_written, {"plan": self.seconds, **seconds},
        )  # fmt: skip
        return self.method.result(done, self.models)


def merge_by(
    method: MergeMethod,
    models: Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    **output: Any,
) -> MergeResult:
    """Merge by a method; see `hf_continual.merge`, which also takes names and describes the arguments."""
    merge = planned(method, models, output_dir, base=base, **output)
    if merge.options.dry_run:
        merge.check()
        show_plan(merge.plan, merge.target)
        return merge.result(merge.plan.facts)
    result = _made(merge)
    return replace(result, url=push(merge.target, merge.options))


def planned(
    method: MergeMethod,
    models: Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    **output: Any,
) -> Planned:
    """Run every check of the inputs and plan the output; only headers and configurations are read.

    Args:
        method: The method.
        models: The models.
        output_dir: Where the result goes.
        base: The base, or None.
        **output: How it is written.

    Returns:
        The merge, planned.

    Raises:
        ValueError: If an argument does not fit.
        MergeError: If the models do not fit.
    """
    options, target = read_output(output), Path(output_dir)
    _check_call(method, models, base)
    method = replace(method)
    opened = method.open(models, base, options)
    method.check(opened)
    started = time.perf_counter()
    for member in opened.members:
        if target.resolve() in (member.own.folder.resolve(), member.checkpoint.folder.resolve()):
            raise ValueError(
                f"output_dir={str(target)!r} is one of the models. Choose another; inputs are never changed."
            )
    job = _not_looked_yet(method, opened) if method.looks else _job(method, opened, method.prepare(opened, Passes()))
    plan = _plan(job, options)
    return Planned(method, opened, target, options, job, plan, time.perf_counter() - started)


def _check_call(method: MergeMethod, models: Sequence[Any], base: Any) -> None:
    if method.from_base and base is None:
        raise ValueError(f"merge {method.name} needs base=, the model that the others were fine-tuned from.")
    check_list(models)
    least, most = method.models
    if not least <= len(models) <= (most or len(models)):
        wanted = f"{least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(
            f"merge {method.name} takes {wanted} models, but {len(models)} were given: {[str(m) for m in models]}."
        )


def _job(method: MergeMethod, models: Models, rules: Rules) -> Job:
    return Job(
        method.name, method.paper, models.members, models.base, rules, method.linear, method.describe(models),
        method.asked(models), method.report, models.newest, {**method.known(models), **method.facts()}, method.outputs,
        method.image,
    )  # fmt: skip


def _not_looked_yet(method: MergeMethod, models: Models) -> Job:
    """The job of a method that has not made its passes yet, with rules of the right kind, for a plan."""
    equal = Average((1 / len(models.members),) * len(models.members))

    def none(values: Any, at: Any) -> Any:
        raise AssertionError("a plan reads no values")

    return replace(_job(method, models, lambda _: equal if method.linear else none), facts=method.known(models))


def _made(merge: Planned) -> MergeResult:
    """Write the output, or return the existing one if it is finished."""
    target, options = merge.target, merge.options
    with locked(target):
        if (done := merge.finished()) is not None:
            logger.info("%s: this merge has already finished", target)
            if options.license is not None:
                write_merge_card(target, merge.job, done, target.resolve().name, options.license)
            return merge.result(done)
        merge.check()
        if merge.method.looks:
            merge = _looked(merge)
        return _written(merge)


def _looked(merge: Planned) -> Planned:
    """Run the method's passes, and lay the output out with the resulting rules."""
    folder = staging_folder(merge.target)
    kept = _kept(folder / FOUND, merge.plan.asked) if merge.options.resume else {}
    passes = Passes(
        kept, lambda: write_json(folder / FOUND, {"asked": merge.plan.asked, "found": kept}), folder / CACHE
    )
    job = _job(merge.method, merge.models, merge.method.prepare(merge.models, passes))
    layout = lay_out(job, merge.options, [])
    return replace(merge, job=job, plan=_identified(job, layout, merge.plan.files, merge.plan.notes, merge.options))


def _kept(file: Path, asked: str) -> dict[str, Any]:
    """Results of an interrupted merge of exactly the same inputs and options."""
    try:
        found: Mapping[str, Any] = read_json(file) if file.is_file() else {}
        return dict(found["found"]) if found.get("asked") == asked else {}
    except (DamagedFile, ValueError, KeyError, TypeError):
        return {}  # it is computed again


def _written(merge: Planned) -> MergeResult:
    """Write the output in the staging folder, and move it into place."""
    started = time.perf_counter()
    job, plan, layout, target = merge.job, merge.plan, merge.plan.layout, merge.target
    work = Staging(target, plan.identity, merge.options.resume, layout.errors)
    check_disk(plan, target, sum(facts["size"] for facts in work.finished.values()))
    total = plan.bytes_streamed + sum(t.nbytes for s in layout.shards for t in s.tensors)
    with bytes_bar(total, f"{job.method} -> {target.name}", merge.options.progress) as tell:
        files = write_shards(layout.shards, work, tell, [f for m in job.members for f in m.own.files])
    if len(layout.shards) > 1:
        write_json(work.out / INDEX, index_of(layout.shards))
    write_side_files(work.out, plan.files, layout.config, layout.config_file, layout.kind == "adapter")
    seconds = time.perf_counter() - started
    report = {**plan.facts, "files": files, "seconds": {"plan": merge.seconds, "merge": seconds}}
    if layout.errors:
        report["truncation_errors"] = layout.errors
    merge.method.evidence(work.out)
    write_json(work.out / job.report, report)
    write_merge_card(work.out, job, report, target.resolve().name, merge.options.license)
    work.publish()
    return merge.result(report, merge=seconds)


def _plan(job: Job, options: Output) -> MergePlan:
    """Compare the models and lay the output out."""
    notes: list[str] = [] if job.members[0].checkpoint.is_adapter else check_configs(job.members)
    notes += check_tokenizers(job.members, options.vocab)
    if options.dtype is None:  # another dtype is a reason to merge one model
        warn_alone(job.members)
    warn_identical(job.members)
    notes += dict.fromkeys(n for m in job.members if m.own is not job.base for n in m.own.notes)
    layout = lay_out(job, options, notes)
    # After comparing the models with each other, which gives clearer messages if they do not fit.
    notes += check_whole([m.checkpoint for m in job.members])
    beside = SideFiles(job.members, job.newest, options.vocab)
    files = beside.files(layout.kind == "model")
    notes += beside.notes
    for note in notes:
        logger.info("%s", note)
    return _identified(job, layout, files, tuple(notes), options)


def _identified(
    job: Job, layout: Layout, files: Mapping[str, Path | str], notes: tuple[str, ...], options: Output
) -> MergePlan:
    """The plan, with the facts that identify it."""
    facts = describe_job(job, layout.kind, layout.rank, list(notes), options)
    own = {f for m in job.members for f in m.own.files}
    of_base = [] if job.base is None else job.base.files
    of_models = {*own, *(f for m in job.members for f in m.checkpoint.files), *of_base}
    read = {s.file for shard in layout.shards for t in shard.tensors for p in t.parts for s in p.sources} | own
    inputs = {k: facts[k] for k in ("schema", "method", "kind", "models", "output_options")}
    shards = [[s.file, s.header.decode("utf-8", "replace")] for s in layout.shards]

    def hashed(sources: Any, **decisive: Any) -> str:
        # Identifies the bytes of the inputs at the time of the passes.
        told = sorted([f.header_sha256, f.size, f.mtime_ns] for f in sources)
        text = json.dumps({**decisive, "layout": shards, "sources": told}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    found = {k: facts[k] for k in ("options", "weights") if k in facts}
    facts["plan"] = hashed(read, facts={**inputs, **found})
    facts["asked"] = hashed(of_models, facts=inputs, asked=dict(job.asked))
    return MergePlan(layout, files, facts, notes)
