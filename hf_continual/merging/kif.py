r"""Recurrent-KIF's fusion offline: two models trained elsewhere, fused element by element (arXiv 2502.17510).

    theta = theta_b + w_in tau_in + w_out tau_out,      tau_in = new - base,      tau_out = old - base

Each side says which elements matter to it, and the rules of `hf_continual.tensors.fusion` give the weights. Base is the
model that both were trained from. LoRA adapters are fused factor by factor, as in training; that means something only
if both went on from one earlier adapter, which is the base then.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_continual.merging.errors import MergeError, some
from hf_continual.merging.kif_importance import (
    SIDES,
    Scores,
    Side,
    check_scores,
    expected_scores,
    given_sources,
    read_scores,
)
from hf_continual.merging.kif_job import Layout, fuse_job
from hf_continual.merging.kif_models import open_models
from hf_continual.merging.kif_rule import FUSE_RULES, Choice, FuseRule, Weighing, weigh
from hf_continual.merging.options import Output, read_output
from hf_continual.merging.publishing import check_push
from hf_continual.merging.run import digest_of, finished_as_asked, make_plan, run_job
from hf_continual.merging.workplace import check_free, folder_beside, locked
from hf_continual.tensors.fusion import WEIGHTS
from hf_continual.tensors.importance import share_rank

if TYPE_CHECKING:
    from datasets import Dataset
    from typing_extensions import Unpack

    from hf_continual.merging.options import OutputOptions
    from hf_continual.merging.result import MergeResult
    from hf_continual.tensors.importance import Order, Scope

    Rows = Dataset | str | os.PathLike[str] | Sequence[dict[str, Any]]
    PathLike = str | os.PathLike[str]


def kif_fuse(
    base: PathLike,
    new: PathLike,
    output_dir: PathLike,
    *,
    old: PathLike | None = None,
    importance: PathLike | Mapping[str, PathLike] | tuple[PathLike, PathLike] | None = None,
    calibration_new: Rows | None = None,
    calibration_old: Rows | None = None,
    rule: FuseRule = "code",
    top_share: float = 0.2,
    scope: Scope = "global",
    temperature: float = 1.0,
    uncertainty: bool | None = None,
    old_from: Literal["base", "new"] = "base",
    base_model: PathLike | None = None,
    beta1: float = 0.85,
    beta2: float = 0.85,
    order: Order = "first",
    batch_size: int = 8,
    max_length: int = 1024,
    device: str | None = None,
    calibration_dtype: str | None = None,
    **output: Unpack[OutputOptions],
) -> MergeResult:
    """Fuse two full models, or two LoRA adapters, by what matters to each, without loading them.

    Weights and scores are read in chunks: memory is bounded whatever their size (the plan of ``dry_run=True`` states
    it). Scores are read three times, twice to find the exact threshold. Calibration is not bounded: it holds the model,
    its gradients and two float32 values per weight.

    Example:
        >>> kif_fuse("base", "law", "both", old="tax", calibration_new=law_rows, calibration_old=tax_rows)
        >>> kif_fuse("earlier", "run/checkpoint-20", "fused", importance="run/checkpoint-20")

    Args:
        base: What both movements are counted from: a full model, or the adapter that both adapters went on from.
        new: What learnt the new task; full models and adapters are not mixed.
        output_dir: Where the result goes; complete or absent.
        old: What learnt the old tasks. None: it did not move from the base, so old tasks only steer the masks, as in
            the authors' runs with LLaMA.
        importance: A checkpoint of a run with `KIF` (``checkpoint-N``) for both sides; or per side, as a pair or by
            ``"new"`` and ``"old"``, a checkpoint or a safetensors file of scores.
        calibration_new: Rows of the new task, in whatever form `KIF` takes its memory. The gradients of `new` on them
            give the importance; goes before `importance`.
        calibration_old: Rows of old tasks, for the gradients of `old`, or of the base where there is no `old`.
        rule: ``"code"``, ``"paper"``, ``"no_shared"``, ``"adaptive"`` or ``"weighted"``, as in `KIF`.
        top_share: Share of the elements that matter to a side.
        scope: One threshold (or weight, for ``"weighted"``) over all scored tensors, or one for each.
        temperature: Of ``rule="adaptive"``.
        uncertainty: Whether importance counts times its uncertainty; None: where there is one.
        old_from: What `old` was trained from: the base, or `new` (as a round of `KIF`: the task, then the memory).
        base_model: The full model that adapters sit on, for calibration; None: the one that their configuration names.
        beta1: Decay of the importance, over batches of calibration.
        beta2: Decay of its uncertainty.
        order: Taylor terms of the sensitivity.
        batch_size: Rows per batch of calibration.
        max_length: Tokens per row of calibration.
        device: Where models run for calibration; None: the accelerator if there is one.
        calibration_dtype: Type they run in; None: the checkpoint's, on a CPU never float16.
        **output: How it is written, see `OutputOptions`. The result is of the inputs' kind.

    Returns:
        Where the result is; the report (``kif_report.json``) says how many elements went to which side.

    Raises:
        ValueError: If an argument does not fit.
        MergeError: If the models or the scores do not, or a file changes meanwhile.
        FileExistsError: If the output folder is in use.
        OSError: If the disk is full.
    """
    choice = Choice(rule, top_share, scope, temperature)
    _check(choice, old_from, order, (beta1, beta2), (batch_size, max_length))
    target, options = Path(output_dir), read_output(output)
    if old is None and old_from == "new":
        raise ValueError(
            "old_from='new' says what old was trained from, and there is no old=. Give it, or leave both out."
        )
    files, rows = given_sources(importance, calibration_new, calibration_old)
    models = open_models(base, new, old)
    _check_output(options, models.are_adapters)
    if rows:  # a wrong path or an empty file fails before anything is computed
        from hf_continual.data.rows import load_rows

        rows = {side: load_rows(_plain(source)) for side, source in rows.items()}
    layout = Layout(models, options)
    sides: dict[Side, Scores] = {s: read_scores(files[s], s, uncertainty) for s in SIDES if s in files}
    who = {"new": models.new, "old": models.old or models.base}
    for side, found in sides.items():
        check_scores(found, side, layout.shapes, layout.changed, who[side].name)
    _check_same_tensors(sides)
    told = {**asdict(choice), "uncertainty": uncertainty, "old_from": old_from, "old": models.old is not None}
    # What is calibrated is what the other side has scores for, else what changed.
    names = list(next(iter(sides.values())).tensors) if sides else layout.changed
    wanted = {n: layout.shapes[n] for n in names}
    later: dict[Side, Scores] = {s: expected_scores(wanted, 1 + (uncertainty is not False)) for s in SIDES if s in rows}
    measured = [beta1, beta2, order, batch_size, max_length, calibration_dtype] if rows else None
    scored = {side: [dict(found.facts), _state(found)] for side, found in sides.items()}
    asked = {**told, "measured": measured, "scores": scored, "rows": {s: digest_of(r) for s, r in rows.items()}}
    checked = fuse_job(layout, Weighing(choice), {**sides, **later}, told, asked)
    if options.dry_run:
        return run_job(checked, target, output)
    if (done := finished_as_asked(checked, target, options)) is not None:
        return done
    check_free(target, options.overwrite)
    # Every check comes before the gradients and the passes that look for thresholds.
    plan, _ = make_plan(checked, target, options)
    check_push(checked, options, plan.kind)
    if rows:
        from hf_continual.merging.calibration import Setting
        from hf_continual.merging.kif_calibration import Measure, calibrated, member_to_run

        measure = Measure(beta1, beta2, order, batch_size, max_length)
        cache = folder_beside(target) / "calibration"
        with locked(target):
            for side in [s for s in SIDES if s in rows]:
                member = member_to_run(who[side], base_model)
                setting = Setting(device, calibration_dtype)
                sides[side] = calibrated(side, member, names, rows[side], measure, setting, cache, uncertainty)
    weighing = weigh(choice, sides)
    result = run_job(fuse_job(layout, weighing, sides, told, asked), target, output)
    streamed = sum(t.read_bytes for t in layout.tensors(weighing, sides, old_from))
    of_scores = sum(t.nbytes for s in sides.values() for both in s.tensors.values() for t in both)
    return replace(result, bytes_read=streamed + of_scores * (3 if rule in WEIGHTS else 2))


def _state(scores: Scores) -> list[Any]:
    """What tells files of scores apart, also where their headers are the same."""
    files = {t.file for both in scores.tensors.values() for t in both}
    return sorted([f.header_sha256, f.size, f.mtime_ns] for f in files)


def _plain(source: Any) -> Any:
    return os.fspath(source) if isinstance(source, os.PathLike) else source


def _check(choice: Choice, old_from: str, order: str, decays: Sequence[float], numbers: Sequence[int]) -> None:
    words = {
        "rule": (choice.rule, FUSE_RULES),
        "scope": (choice.scope, ("global", "tensor")),
        "old_from": (old_from, ("base", "new")),
        "order": (order, ("first", "second", "mixed")),
    }
    for key, (value, known) in words.items():
        if value not in known:
            hint = " Without identification it is task_arithmetic(scale=1)." if value == "sum" else ""
            raise ValueError(f"{key}={value!r} is not known; there are {', '.join(known)}.{hint}")
    share_rank(1, choice.top_share)
    if not 0 < choice.temperature < float("inf"):
        raise ValueError(f"temperature={choice.temperature!r} must be above 0.")
    for key, value in zip(("beta1", "beta2"), decays, strict=True):
        if not 0 < value < 1:
            raise ValueError(f"{key}={value!r} must lie between 0 and 1.")
    for key, value in zip(("batch_size", "max_length"), numbers, strict=True):
        if value < 1:
            raise ValueError(f"{key}={value}: at least 1 is needed.")


def _check_output(options: Output, adapters: bool) -> None:
    kind = "adapter" if adapters else "model"
    if options.output not in (None, kind):
        raise ValueError(
            f"output={options.output!r}: what is fused element by element stays what it was, here {kind!r}. Leave it out."
        )
    if options.quantized_base != "original":
        raise ValueError(
            f"quantized_base={options.quantized_base!r}: adapters are fused as they are and put onto no base. Leave it out."
        )
    if options.adapter_rank is not None:
        raise ValueError(
            f"adapter_rank={options.adapter_rank}: a fusion keeps the rank of its adapters. Leave it out, or merge_linear."
        )


def _check_same_tensors(sides: Mapping[Side, Scores]) -> None:
    if len(sides) == 2 and (apart := sides["new"].tensors.keys() ^ sides["old"].tensors.keys()):
        raise MergeError(
            f"importance of the new and the old side is of different tensors: {len(apart)} are on one side only "
            f"({some(apart)}). Measure both sides of the same trainable weights."
        )
