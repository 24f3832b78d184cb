"""`interpolate` and `scan_alpha`: the line from the base to the tuned model; see `hf_continual.merging.methods.interpolate`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_continual.durable import read_json, write_json
from hf_continual.merging.merge import job_of, merge
from hf_continual.merging.methods.interpolate import Interpolate
from hf_continual.merging.options import Output, read_output
from hf_continual.merging.publishing import check_push
from hf_continual.merging.run import finished_already, make_plan
from hf_continual.merging.workplace import check_free

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hf_continual.merging.options import OutputOptions
    from hf_continual.merging.result import MergeResult


SCAN = "alpha_scan.json"  # in the output of `scan_alpha`: what was measured where


def interpolate(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    alpha: float,
    **output: Unpack[OutputOptions],
) -> MergeResult:
    """Write the model at `alpha` of the way from the base to the tuned one.

    Example:
        >>> interpolate("Qwen/Qwen2.5-0.5B", "law", "law-half", alpha=0.5)

    Args:
        base: The full model it was tuned from.
        tuned: A full model, or a LoRA adapter on the base.
        output_dir: Where the result goes; complete or absent.
        alpha: Share of the way; beyond 1 exaggerates what was learnt.
        **output: Form of the output and how it is written, see `OutputOptions`.

    Returns:
        Where the result is and what it is made of.

    Raises:
        ValueError: If `alpha` is no finite number.
        MergeError: If the models do not fit.
    """
    return merge(Interpolate(alpha), [tuned], output_dir, base=base, **output)


def scan_alpha(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    gauge: Callable[[Path], float],
    *,
    alphas: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    lower_is_better: bool = False,
    **output: Unpack[OutputOptions],
) -> tuple[MergeResult, dict[float, float]]:
    """Try several points of the line with a gauge and keep the best.

    One candidate is on the disk at a time. What was measured is kept beside the output while the scan runs, so an
    interrupted scan resumes. Called again when it is finished, it returns what it found; for another gauge say overwrite=True
    and resume=False.

    Example:
        >>> best, scores = scan_alpha(base, "law", "law-best", gauge=lambda folder: score(folder))

    Args:
        base: The full model it was tuned from.
        tuned: A full model, or a LoRA adapter on the base.
        output_dir: Where the best goes.
        gauge: Measures a candidate, given its folder (a model, or an adapter on the base).
        alphas: The points.
        lower_is_better: Whether the gauge is a loss.
        **output: Form of the output and how it is written, see `OutputOptions`.

    Returns:
        The best, and the gauge's value by alpha. Of equal values the smaller alpha wins.

    Raises:
        ValueError: If there is no point, or the gauge gives no number for any.
        HubPushError: If the best is to be published and that cannot succeed; found before the first candidate.
    """
    if not alphas:
        raise ValueError("alphas is empty: give the points to try.")
    methods = [Interpolate(alpha) for alpha in alphas]
    options = read_output(output)
    target = Path(output_dir)
    if options.dry_run:
        return interpolate(base, tuned, target, alpha=alphas[0], **output), {}
    if (done := _finished(methods, [tuned], base, target, options, lower_is_better)) is not None:
        return interpolate(base, tuned, target, alpha=done[0], **output), done[1]
    check_free(target, options.overwrite)
    checked = job_of(methods[0], [tuned], base, options)
    check_push(checked, options, make_plan(checked, target, options)[0].kind)
    trial, measured = target.parent / f".{target.name}.trial", target.parent / f".{target.name}.scan.json"
    found: dict[float, float] = {}
    # Only the best is published, and candidates are replaced.
    candidate = output.copy()
    candidate["overwrite"] = True
    for key in ("push_to_hub", "private", "token"):
        candidate.pop(key, None)
    for alpha in sorted({float(a) for a in alphas}):
        if alpha in found:
            continue
        made = interpolate(base, tuned, trial, alpha=alpha, **candidate)
        # What an interrupted scan has measured counts only for these very models.
        models = [made.kind, made.report["models"], made.report["output_options"]]
        if not found and options.resume and measured.is_file() and (old := read_json(measured))["models"] == models:
            found = dict(map(tuple, old["found"]))
        if alpha not in found:
            found[alpha] = float(gauge(trial))
        write_json(measured, {"models": models, "found": sorted(found.items())})
    numbers = {a: found[a] for a in sorted(float(a) for a in alphas) if found[a] == found[a]}
    if not numbers:
        raise ValueError(f"the gauge gave no number for any of {list(alphas)}.")
    best = min(numbers, key=lambda a: (numbers[a] if lower_is_better else -numbers[a], a))
    result = interpolate(base, tuned, target, alpha=best, **output)
    write_json(target / SCAN, {"best": best, "lower_is_better": lower_is_better, "found": sorted(found.items())})
    shutil.rmtree(trial, ignore_errors=True)
    measured.unlink(missing_ok=True)
    return result, found


def _finished(
    methods: Sequence[Interpolate], models: Sequence[str | os.PathLike[str]], base: str | os.PathLike[str], target: Path,
    options: Output, lower_is_better: bool,
) -> tuple[float, dict[float, float]] | None:  # fmt: skip
    """The best point and all values of a scan of the same models and points that is finished."""
    if not options.resume or not (target / SCAN).is_file():
        return None
    old = read_json(target / SCAN)
    found = {float(a): float(v) for a, v in old["found"]}
    same = set(found) == {float(m.alpha) for m in methods} and old["lower_is_better"] == lower_is_better
    job = job_of(Interpolate(old["best"]), models, base, options)
    return (old["best"], found) if same and finished_already(job, target, options) else None
