"""From the base to the tuned model and every point between: WiSE-FT (Wortsman et al., CVPR 2022, arXiv 2109.01903).

    theta(alpha) = theta_base + alpha (theta_tuned - theta_base)

alpha = 0 is the base, alpha = 1 the tuned model. What was learned and what was there before change at different rates
along the line, so a scan with a gauge for each shows where to stop.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hf_continual.atomic_files import read_json, write_json
from hf_continual.bounds import number
from hf_continual.merging.engine.average import Average
from hf_continual.merging.engine.passes import Passes
from hf_continual.merging.methods.base import MergeMethod, Models, Rules
from hf_continual.merging.pipeline import Planned, merge_by, planned
from hf_continual.paper import Paper

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hf_continual.merging.engine.options import OutputOptions
    from hf_continual.merging.engine.result import MergeResult

SCAN = "alpha_scan.json"  # in the output of `scan_alpha`: the gauge's value at each point


@dataclass
class Interpolate(MergeMethod):
    """Take the point at `alpha` of the way from the base to the tuned model.

    Args:
        alpha: Fraction of the way; above 1 amplifies what was learned.

    Raises:
        ValueError: If it is not a finite number.
    """

    alpha: float

    name: ClassVar[str] = "interpolate"
    paper: ClassVar[Paper] = Paper(
        "Robust fine-tuning of zero-shot models", "Wortsman et al.", 2022, "2109.01903", "CVPR 2022"
    )
    from_base: ClassVar[bool] = True
    models: ClassVar[tuple[int, int | None]] = (1, 1)
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number(self.name, "alpha", self.alpha)
        if not abs(self.alpha) < float("inf"):
            raise ValueError(f"alpha={self.alpha!r}: give a finite number, 0 for the base and 1 for the tuned model.")

    def prepare(self, models: Models, passes: Passes) -> Rules:
        """One weighted sum."""
        rule = Average((1.0 - float(self.alpha), float(self.alpha)))
        return lambda _: rule

    def describe(self, models: Models) -> dict[str, Any]:
        """The fraction of the way."""
        return {"alpha": float(self.alpha)}


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
        base: The full model that it was fine-tuned from.
        tuned: A full model, or a LoRA adapter on the base.
        output_dir: Output folder; complete or absent.
        alpha: Fraction of the way; above 1 amplifies what was learned.
        **output: Form of the output and how it is written, see `OutputOptions`.

    Returns:
        The output folder, and the report of what it was made from.

    Raises:
        ValueError: If `alpha` is not a finite number.
        MergeError: If the models do not fit.
    """
    return merge_by(Interpolate(alpha), [tuned], output_dir, base=base, **output)


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
    """Try several points of the line with a gauge, and keep the best.

    Only one candidate is on disk at a time. Measurements are kept next to the output while the scan runs, so an
    interrupted scan resumes. Called again after it has finished, it returns the stored result; for another gauge, give overwrite=True
    and resume=False.

    Example:
        >>> best, scores = scan_alpha(base, "law", "law-best", gauge=lambda folder: score(folder))

    Args:
        base: The full model that it was fine-tuned from.
        tuned: A full model, or a LoRA adapter on the base.
        output_dir: Where the best candidate goes.
        gauge: Measures a candidate, given its folder (a model, or an adapter on the base).
        alphas: The points.
        lower_is_better: Whether the gauge is a loss.
        **output: Form of the output and how it is written, see `OutputOptions`.

    Returns:
        The best candidate, and the gauge's value by alpha. Among equal values, the smaller alpha wins.

    Raises:
        ValueError: If there is no point, or the gauge returns a number for none of them.
        HubPushError: If the push of the best cannot succeed; this is checked before the first candidate.
    """
    if not alphas:
        raise ValueError("alphas is empty: give the points to try.")
    target, points = Path(output_dir), sorted({float(a) for a in alphas})
    ready = planned(Interpolate(alphas[0]), [tuned], target, base=base, **output)
    if ready.options.dry_run:
        return interpolate(base, tuned, target, alpha=alphas[0], **output), {}
    if (done := _finished(ready, base, tuned, points, lower_is_better)) is not None:
        return interpolate(base, tuned, target, alpha=done[0], **output), done[1]
    ready.check()
    found = _measured(base, tuned, target, gauge, points, ready.options.resume, output)
    numbers = {a: found[a] for a in points if found[a] == found[a]}
    if not numbers:
        raise ValueError(f"the gauge returned no number for any of {list(alphas)}.")
    best = min(numbers, key=lambda a: (numbers[a] if lower_is_better else -numbers[a], a))
    result = interpolate(base, tuned, target, alpha=best, **output)
    write_json(target / SCAN, {"best": best, "lower_is_better": lower_is_better, "found": sorted(found.items())})
    shutil.rmtree(_trial(target), ignore_errors=True)
    _notes(target).unlink(missing_ok=True)
    return result, found


def _measured(
    base: str | os.PathLike[str], tuned: str | os.PathLike[str], target: Path, gauge: Callable[[Path], float],
    points: Sequence[float], resume: bool, output: OutputOptions,
) -> dict[float, float]:  # fmt: skip
    """The gauge's value at each point."""
    trial, notes = _trial(target), _notes(target)
    found: dict[float, float] = {}
    # Only the best is pushed, and candidates replace each other.
    candidate = output.copy()
    candidate["overwrite"] = True
    for key in ("push_to_hub", "private", "token"):
        candidate.pop(key, None)
    for alpha in points:
        if alpha in found:
            continue
        made = interpolate(base, tuned, trial, alpha=alpha, **candidate)
        # Measurements of an interrupted scan are valid only for exactly these models.
        models = [made.kind, made.report["models"], made.report["output_options"]]
        if not found and resume and notes.is_file() and (old := read_json(notes))["models"] == models:
            found = dict(map(tuple, old["found"]))
        if alpha not in found:
            found[alpha] = float(gauge(trial))
        write_json(notes, {"models": models, "found": sorted(found.items())})
    return found


def _trial(target: Path) -> Path:
    return target.parent / f".{target.name}.trial"


def _notes(target: Path) -> Path:
    return target.parent / f".{target.name}.scan.json"


def _finished(
    ready: Planned,
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    points: Sequence[float],
    lower_is_better: bool,
) -> tuple[float, dict[float, float]] | None:
    """The best point and all values of a finished scan of the same models and points."""
    if not ready.options.resume or not (ready.target / SCAN).is_file():
        return None
    old = read_json(ready.target / SCAN)
    found = {float(a): float(v) for a, v in old["found"]}
    if set(found) != set(points) or old["lower_is_better"] != lower_is_better:
        return None
    output = {f.name: getattr(ready.options, f.name) for f in fields(ready.options)}
    best = planned(Interpolate(old["best"]), [tuned], ready.target, base=base, **output)
    return None if best.finished() is None else (old["best"], found)
