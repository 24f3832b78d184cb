"""From opened models and a rule to a finished output: every check, the plan, the writing, the report."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_continual.durable import read_json, write_json
from hf_continual.merging.adapter_output import adapter_config, adapter_tensors, check_adapter_output
from hf_continual.merging.architecture import check_whole
from hf_continual.merging.card import write_merge_card
from hf_continual.merging.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, INDEX
from hf_continual.merging.checks import check_tokenizers, warn_identical
from hf_continual.merging.configs import check_configs
from hf_continual.merging.errors import MergeError
from hf_continual.merging.job import Job
from hf_continual.merging.model_output import model_config, model_tensors
from hf_continual.merging.options import Output, read_output, transformers_name
from hf_continual.merging.plan import MergePlan, check_disk, show_plan
from hf_continual.merging.progress import bytes_bar
from hf_continual.merging.publishing import check_push, push
from hf_continual.merging.report import describe_job
from hf_continual.merging.result import MergeResult
from hf_continual.merging.shards import index_of, make_shards
from hf_continual.merging.side_files import SideFiles, write_side_files
from hf_continual.merging.workplace import Workplace, check_free, folder_beside, locked
from hf_continual.merging.writer import write_shards

logger = logging.getLogger(__name__)

_ADAPTER_STEM = ADAPTER_WEIGHTS.removesuffix(".safetensors")


def run_job(job: Job, output_dir: Path, given: Mapping[str, Any]) -> MergeResult:
    """Make a merge, and push it if that is asked for; see `_run`."""
    options = read_output(given)
    result = _run(job, output_dir, options)
    return replace(result, url=push(output_dir, options))


def _run(job: Job, output_dir: Path, options: Output) -> MergeResult:
    """Check, plan, write, publish.

    Args:
        job: The merge.
        output_dir: Where the result goes.
        options: How it is written.

    Returns:
        The result.

    Raises:
        ValueError: If an argument does not fit.
        MergeError: If the models do not, or a file changes meanwhile.
        FileExistsError: If the output folder is in use.
        OSError: If the disk is full.
    """
    started = time.perf_counter()
    for member in job.members:
        if output_dir.resolve() in (member.own.folder.resolve(), member.checkpoint.folder.resolve()):
            raise ValueError(
                f"output_dir={str(output_dir)!r} is one of the models. Choose another; inputs are never changed."
            )
    plan, errors = make_plan(job, output_dir, options)
    planned = time.perf_counter()
    if options.dry_run:
        check_free(output_dir, options.overwrite)
        check_disk(plan, output_dir)
        check_push(job, options, plan.kind)
        show_plan(plan, output_dir)
        return _result(job, plan, output_dir, {"plan": planned - started}, plan.facts)
    with locked(output_dir):
        if options.resume and (done := _finished(output_dir, job.report, plan.identity)) is not None:
            logger.info("%s: this merge is finished already", output_dir)
            if options.license is not None:
                write_merge_card(output_dir, job, done, output_dir.resolve().name, options.license)
            return _result(job, plan, output_dir, {"plan": planned - started}, done)
        check_free(output_dir, options.overwrite)
        if not (folder_beside(output_dir) / "out").exists():
            check_disk(plan, output_dir)
        check_push(job, options, plan.kind)
        work = Workplace(output_dir, plan.identity, options.resume, errors)
        check_disk(plan, output_dir, sum(facts["size"] for facts in work.finished.values()))
        with bytes_bar(
            plan.bytes_streamed + sum(t.nbytes for s in plan.shards for t in s.tensors),
            f"{job.method} -> {output_dir.name}",
            options.progress,
        ) as tell:
            files = write_shards(plan.shards, work, tell, [f for m in job.members for f in m.own.files])
        if len(plan.shards) > 1:
            write_json(work.out / INDEX, index_of(plan.shards))
        write_side_files(work.out, plan.files, plan.config, plan.config_file, plan.kind == "adapter")
        seconds = {"plan": planned - started, "merge": time.perf_counter() - planned}
        report = {**plan.facts, "files": files, "seconds": seconds}
        if errors:
            report["truncation_errors"] = errors
        if job.evidence is not None:
            job.evidence(work.out)
        write_json(work.out / job.report, report)
        write_merge_card(work.out, job, report, output_dir.resolve().name, options.license)
        work.publish()
    return _result(job, plan, output_dir, seconds, report)


def make_plan(job: Job, output_dir: Path, options: Output) -> tuple[MergePlan, dict[str, float]]:
    """Make every check and lay the output out; only headers and configurations are read.

    Args:
        job: The merge.
        output_dir: Where the result goes.
        options: How it is written.

    Returns:
        The plan, and a dictionary that is filled with the truncation error of each module while it is written.
    """
    elements = job.members[0].checkpoint.is_adapter
    notes: list[str] = [] if elements else check_configs(job.members)
    notes += check_tokenizers(job.members, options.vocab)
    warn_identical(job.members)
    errors: dict[str, float] = {}
    kind = "model" if job.tensors is not None else _kind(job, options)
    notes += dict.fromkeys(n for m in job.members if m.own is not job.base for n in m.own.notes)
    if job.base is not None and kind == "model" and not elements:
        notes += job.base.notes
    reference = job.members[0].checkpoint
    if kind == "adapter":
        if job.base is not None and job.base.seen_as is not None:
            raise ValueError(
                f"quantized_base={options.quantized_base!r} changes the base, and the output is an adapter, which leaves it "
                f"alone. Give output='model', or leave quantized_base out."
            )
        outputs, ranks = adapter_tensors(job.members, job.rule_for, options.adapter_rank, options.dtype, errors)
        shards = make_shards(outputs, max(1, sum(t.nbytes for t in outputs)), _ADAPTER_STEM)
        config, config_file, rank = adapter_config(job.members, ranks), None, max(ranks.values(), default=0)
    else:
        if options.adapter_rank is not None:
            raise ValueError(
                f"adapter_rank={options.adapter_rank} is for output='adapter'; this output is a full model."
            )
        if job.tensors is not None:
            outputs = job.tensors(options, notes)
        else:
            outputs = model_tensors(job.members, job.rule_for, options.dtype, options.vocab, notes)
        shards = make_shards(outputs, options.max_shard_size)
        named = None if options.dtype is None else transformers_name(options.dtype)
        config, rank = model_config(reference, outputs, named), None
        config_file = reference.folder / CONFIG if config == reference.config else None
        if elements:  # an adapter is one file, and the configuration is the one that all have
            kind, rank, shards = "adapter", reference.config.get("r"), make_shards(outputs, 2**62, _ADAPTER_STEM)
            config, config_file = reference.config, reference.folder / ADAPTER_CONFIG
    # After the models were compared with each other, which says more where they do not fit.
    notes += check_whole([m.checkpoint for m in job.members])
    beside = SideFiles(job.members, job.newest, options.vocab)
    files = beside.files(kind == "model")
    notes += beside.notes
    for note in notes:
        logger.info("%s", note)
    facts = describe_job(job, kind, rank, notes, options)
    sources = {s.file for t in outputs for p in t.parts for s in p.sources} | {
        f for m in job.members for f in m.own.files
    }
    # What decides the output's bytes, and which bytes the inputs were when they were looked at.
    decisive = {
        "facts": {
            k: facts[k]
            for k in ("schema", "method", "kind", "models", "options", "output_options", "weights")
            if k in facts
        },
        "layout": [[s.file, s.header.decode("utf-8", "replace")] for s in shards],
        "sources": sorted([f.header_sha256, f.size, f.mtime_ns] for f in sources),
    }
    identity = _hash(decisive)
    facts["plan"] = identity
    told = {k: v for k, v in decisive["facts"].items() if k not in ("weights", "options")}
    own = sorted([f.header_sha256, f.size, f.mtime_ns] for m in job.members for f in m.own.files)
    asked = facts["options"] if job.asked is None else job.asked
    facts["asked"] = _hash({**decisive, "facts": told, "sources": own, "asked": asked})
    return MergePlan(kind, rank, tuple(shards), config, config_file, files, facts, identity, tuple(notes)), errors


def digest_of(rows: Any) -> str | None:
    """What tells texts or rows apart."""
    if rows is None:
        return None
    seen = hashlib.sha256()
    for row in rows:
        seen.update(json.dumps(row, sort_keys=True, default=str).encode())
    return seen.hexdigest()[:32]


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def finished_already(job: Job, output_dir: Path, options: Output) -> bool:
    """Whether the output folder holds this very merge, whole; it makes every check of `make_plan`."""
    return is_finished(job, make_plan(job, output_dir, options)[0], output_dir, options)


def is_finished(job: Job, plan: MergePlan, output_dir: Path, options: Output) -> bool:
    """As `finished_already`, of a merge whose plan is made."""
    return options.resume and not options.dry_run and _finished(output_dir, job.report, plan.identity) is not None


def finished_as_asked(job: Job, output_dir: Path, options: Output) -> MergeResult | None:
    """The result of a finished merge of these models that was asked for the same, whatever it found then.

    Args:
        job: The merge, before anything was looked for.
        output_dir: Where the result goes.
        options: How it is written.

    Returns:
        The result, or None.
    """
    if not options.resume or options.dry_run:
        return None
    started = time.perf_counter()
    plan, _ = make_plan(job, output_dir, options)
    with locked(output_dir):
        done = _finished(output_dir, job.report, plan.facts["asked"], "asked")
    if done is None:
        return None
    logger.info("%s: this merge is finished already", output_dir)
    result = _result(job, plan, output_dir, {"plan": time.perf_counter() - started}, done)
    return replace(result, url=push(output_dir, options))


def _kind(job: Job, options: Output) -> str:
    why_not = check_adapter_output(job.members, job.base, job.is_linear)
    if options.output == "adapter" and why_not:
        raise MergeError(f"output='adapter' is not possible: {why_not}. Give output='model'.")
    if options.output is not None:
        return options.output
    return "model" if why_not else "adapter"


def _finished(output_dir: Path, report: str, identity: str, key: str = "plan") -> dict[str, Any] | None:
    file = output_dir / report
    if not file.is_file():
        return None
    found = read_json(file)
    whole = found.get(key) == identity and all(
        (output_dir / name).is_file() and (output_dir / name).stat().st_size == facts["size"]
        for name, facts in found.get("files", {}).items()
    )
    return found if whole else None


def _result(
    job: Job, plan: MergePlan, output_dir: Path, seconds: Mapping[str, float], report: Mapping[str, Any]
) -> MergeResult:
    return MergeResult(
        output_dir,
        job.method,
        job.paper,
        plan.kind,
        plan.rank,
        report,
        plan.bytes_read,
        plan.bytes_written,
        dict(seconds),
    )
