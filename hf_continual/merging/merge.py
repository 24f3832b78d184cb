"""`merge`: one pipeline for every way of merging, from names of models to a finished, published output."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from hf_continual.durable import DamagedFile, read_json, write_json
from hf_continual.merging.average import Average
from hf_continual.merging.job import Job
from hf_continual.merging.members import open_from_base, open_members
from hf_continual.merging.methods.base import MergeMethod, Models, Rules
from hf_continual.merging.methods.table import build_merge
from hf_continual.merging.options import Output, read_output
from hf_continual.merging.passes import Passes
from hf_continual.merging.publishing import check_push
from hf_continual.merging.result import MergeResult
from hf_continual.merging.run import is_finished, make_plan, run_job
from hf_continual.merging.workplace import FOUND, check_free, folder_beside, locked


def merge(
    method: MergeMethod | str,
    models: Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    **options: Any,
) -> MergeResult:
    """Merge checkpoints without loading them.

    Every check comes first, then the passes that look at values, then the output, which is complete or absent. Interrupted, the
    same call resumes; called again when it is finished, it returns what is there.

    Example:
        >>> merge("ties", ["law", "tax"], "both", base="Qwen/Qwen2.5-0.5B", density=0.2)
        >>> merge(MyRule(strength=2), ["law", "tax"], "both", base="Qwen/Qwen2.5-0.5B")

    Args:
        method: A name: ``linear``, ``interpolate``, ``slerp``, ``task_arithmetic``, ``ties``, ``dare``, ``dare_ties``,
            ``della``, ``breadcrumbs``, ``consensus``, ``fapm``, ``magnitude_max``, ``model_stock``, or
            ``"package.module:Class"``; or a `MergeMethod`.
        models: Full models and LoRA adapters, in any mix: folders or Hub ids (``"id@revision"``), oldest first.
        output_dir: Where the result goes; complete or absent.
        base: The full model that adapters sit on, or that changes are counted from.
        **options: Hyper-parameters of the method, where it is named; and how the output is written, see `OutputOptions`.

    Returns:
        Where the result is and what it is made of.

    Raises:
        TypeError: If there is no such option.
        ValueError: If an argument does not fit.
        MergeError: If the models do not, or a file changes meanwhile.
        FileExistsError: If the output folder is in use.
        OSError: If the disk is full.
    """
    named = not isinstance(method, MergeMethod)
    own = {k for k in options if k not in {f.name for f in fields(Output)}} if named else set()
    given = {k: v for k, v in options.items() if k not in own}
    chosen = build_merge(method, {k: options[k] for k in own})
    output, target = read_output(given), Path(output_dir)
    opened = open_models(chosen, models, base, output)
    chosen.check(opened)
    if not chosen.looks:
        return run_job(_job(chosen, opened, chosen.prepare(opened, Passes())), target, given)
    # Without facts: those of an object that has merged before are of other models.
    planned = replace(_job(chosen, opened, _not_looked_yet(chosen, opened)), facts={})
    if output.dry_run:
        return run_job(planned, target, given)
    plan, _ = make_plan(planned, target, output)
    if is_finished(planned, plan, target, output):
        return run_job(planned, target, given)
    check_free(target, output.overwrite)
    check_push(planned, output, plan.kind)
    with locked(target):
        file = folder_beside(target) / FOUND
        kept = _kept(file, plan.identity) if output.resume else {}
        rules = chosen.prepare(opened, Passes(kept, lambda: write_json(file, {"plan": plan.identity, "found": kept})))
    return run_job(_job(chosen, opened, rules), target, given)


def open_models(
    method: MergeMethod,
    models: Sequence[str | os.PathLike[str]],
    base: str | os.PathLike[str] | None,
    output: Output,
) -> Models:
    """Open what a method takes.

    Args:
        method: The method.
        models: The models.
        base: The base, or None.
        output: How the output is written.

    Returns:
        The models.

    Raises:
        ValueError: If there are too few or too many, or the base is missing.
    """
    if method.from_base and base is None:
        raise ValueError(f"merge {method.name} needs base=, the model that the others were tuned from.")
    least, most = method.models
    count = len(models) if not isinstance(models, str | os.PathLike) else None
    if count is not None and not least <= count <= (most or count):
        wanted = f"{least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(
            f"merge {method.name} takes {wanted} models, and {count} were given: {[str(m) for m in models]}."
        )
    if method.from_base:
        assert base is not None
        members, full = open_from_base(models, base, output.quantized_base)
    else:
        members, full = open_members(models, base, output.quantized_base)
    return Models(tuple(members), full, method.from_base)


def job_of(
    method: MergeMethod, models: Sequence[str | os.PathLike[str]], base: str | os.PathLike[str] | None, output: Output
) -> Job:
    """The job of a method that does not look at values; for checks before several merges.

    Args:
        method: The method.
        models: The models.
        base: The base, or None.
        output: How the output is written.

    Returns:
        The job.
    """
    opened = open_models(method, models, base, output)
    return _job(method, opened, method.prepare(opened, Passes()))


def _job(method: MergeMethod, models: Models, rules: Rules) -> Job:
    return Job(
        method.name,
        method.paper,
        models.members,
        models.base,
        rules,
        method.describe(models),
        facts=method.facts(),
        linear=method.linear,
    )


def _not_looked_yet(method: MergeMethod, models: Models) -> Rules:
    """Rules of the right kind, for a plan."""
    number = len(models.members)
    if method.linear:
        return lambda _: Average((1 / number,) * number)

    def none(values: Any, at: Any) -> Any:
        raise AssertionError("a plan reads no values")

    return lambda _: none


def _kept(file: Path, identity: str) -> dict[str, Any]:
    """What an interrupted merge of the very same inputs and options has found."""
    try:
        found: Mapping[str, Any] = read_json(file) if file.is_file() else {}
        return dict(found["found"]) if found.get("plan") == identity else {}
    except (DamagedFile, ValueError, KeyError, TypeError):
        return {}  # it is found again
