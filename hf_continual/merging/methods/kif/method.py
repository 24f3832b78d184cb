r"""Offline fusion by Recurrent-KIF: two models trained elsewhere, fused element by element (arXiv 2502.17510).

    theta = theta_b + w_in tau_in + w_out tau_out,      tau_in = new - base,      tau_out = old - base

Each side determines which elements matter to it, and the rules of `hf_continual.tensors.fusion` give the weights. Base is the
model that both were trained from. LoRA adapters are fused factor by factor, as in training; this is meaningful only
if both continued from one earlier adapter, which is then the base.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from hf_continual.bounds import between, whole_number
from hf_continual.merging.engine.chunks import OutputTensor
from hf_continual.merging.engine.job import digest_of
from hf_continual.merging.engine.options import Output
from hf_continual.merging.engine.passes import Passes
from hf_continual.merging.engine.result import MergeResult
from hf_continual.merging.errors import MergeError, some
from hf_continual.merging.methods.base import MergeMethod, Models, Rules
from hf_continual.merging.methods.kif.layout import Layout, described, told_of
from hf_continual.merging.methods.kif.models import FusedModels, open_fused
from hf_continual.merging.methods.kif.rule import FUSE_RULES, Choice, FuseRule, Weighing, weigh
from hf_continual.merging.methods.kif.scores import (
    SIDES,
    Scores,
    Side,
    check_scores,
    expected_scores,
    given_sources,
    read_scores,
)
from hf_continual.paper import Paper
from hf_continual.tensors.fusion import WEIGHTS
from hf_continual.tensors.importance import Order, Scope

PathLike = str | os.PathLike[str]
Importance = PathLike | Mapping[str, PathLike] | tuple[PathLike, PathLike] | None
# A data set, a file, a Hub id, or rows; not typed here, since that would import the datasets library.
Rows = Any

KIF_REPORT, HEAT_MAP = "kif_report.json", "kif_sides.png"


@dataclass
class Kif(MergeMethod):
    """Fuse two full models, or two LoRA adapters, by what matters to each. Models: the old one, if it changed, then the new one.

    Args:
        importance: A checkpoint of a run with `KIF` (``checkpoint-N``) for both sides; or one per side, as a pair or by
            ``"new"`` and ``"old"``, a checkpoint or a safetensors file of scores.
        calibration_new: Rows of the new task, in any form that `KIF` accepts for its memory. The gradients of `new` on them
            give the importance; takes precedence over `importance`.
        calibration_old: Rows of old tasks, for the gradients of `old`, or of the base if there is no `old`.
        rule: ``"code"``, ``"paper"``, ``"no_shared"``, ``"adaptive"`` or ``"weighted"``, as in `KIF`.
        top_share: Fraction of the elements that count as important to a side.
        scope: One threshold (or weight, for ``"weighted"``) over all scored tensors, or one for each.
        temperature: Temperature of ``rule="adaptive"``.
        uncertainty: Multiply importance by its uncertainty; None: if the scores have one.
        old_from: What `old` was trained from: the base, or `new` (as a round of `KIF`: the task, then the memory).
        base_model: The full model that the adapters belong to, for calibration; None: the one that their configuration names.
        beta1: Decay of the importance, over batches of calibration.
        beta2: Decay of its uncertainty.
        order: Taylor terms of the sensitivity.
        batch_size: Rows per batch of calibration.
        max_length: Tokens per row of calibration.
        device: Where models run for calibration; None: the accelerator if there is one.
        calibration_dtype: dtype they run in; None: the checkpoint's, on a CPU never float16.

    Raises:
        ValueError: If an option is not known, out of range, or a side has no importance.
    """

    importance: Importance = None
    calibration_new: Rows | None = field(default=None, repr=False)
    calibration_old: Rows | None = field(default=None, repr=False)
    rule: FuseRule = "code"
    top_share: float = 0.2
    scope: Scope = "global"
    temperature: float = 1.0
    uncertainty: bool | None = None
    old_from: Literal["base", "new"] = "base"
    base_model: PathLike | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    order: Order = "first"
    batch_size: int = 8
    max_length: int = 1024
    device: str | None = None
    calibration_dtype: str | None = None
    _layout: Any = field(default=None, init=False, repr=False)
    _rows: dict[Side, Any] = field(default_factory=dict, init=False, repr=False)
    _scored: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _sides: dict[Side, Scores] = field(default_factory=dict, init=False, repr=False)
    _weighing: Any = field(default=None, init=False, repr=False)
    _told: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    name: ClassVar[str] = "kif"
    paper: ClassVar[Paper] = Paper(
        "Recurrent Knowledge Identification and Fusion for Language Model Continual Learning",
        "Feng et al.",
        2025,
        "2502.17510",
        "ACL 2025",
    )
    from_base: ClassVar[bool] = True
    looks: ClassVar[bool] = True
    models: ClassVar[tuple[int, int | None]] = (1, 2)
    report: ClassVar[str] = KIF_REPORT
    image: ClassVar[str | None] = HEAT_MAP

    def __post_init__(self) -> None:
        words = {
            "rule": FUSE_RULES, "scope": ("global", "tensor"), "old_from": ("base", "new"), "order": ("first", "second", "mixed"),
        }  # fmt: skip
        for key, known in words.items():
            if (value := getattr(self, key)) not in known:
                hint = " Without identification it is task_arithmetic(scale=1)." if value == "sum" else ""
                raise ValueError(f"{key}={value!r} is not known; there are {', '.join(known)}.{hint}")
        between(self.name, "top_share", self.top_share, 0, 1, "]")
        between(self.name, "temperature", self.temperature, 0, float("inf"))
        for key in ("beta1", "beta2"):
            between(self.name, key, getattr(self, key), 0, 1)
        for key in ("batch_size", "max_length"):
            whole_number(self.name, key, getattr(self, key))

    def open(
        self, models: Sequence[str | os.PathLike[str]], base: str | os.PathLike[str] | None, output: Output
    ) -> FusedModels:
        """Open the models and the scores of both sides; a side still to be measured gets placeholder scores."""
        assert base is not None
        if self.old_from == "new" and len(models) == 1:
            raise ValueError(
                "old_from='new' describes what old was trained from, but old= was not given. Give it, or leave both out."
            )
        files, rows = given_sources(self.importance, self.calibration_new, self.calibration_old)
        fused = open_fused(base, models[-1], models[0] if len(models) == 2 else None)
        _check_output(output, fused.are_adapters)
        if rows:  # a wrong path or an empty file fails before anything is computed
            from hf_continual.data.rows import load_rows

            self._rows = {side: load_rows(_plain(rows[side])) for side in SIDES if side in rows}
        self._layout, self._weighing = Layout(fused, output), Weighing(self._choice)
        given: dict[Side, Scores] = {s: read_scores(files[s], s, self.uncertainty) for s in SIDES if s in files}
        for side, found in given.items():
            check_scores(found, side, self._layout.shapes, self._layout.changed, fused.of(side).name)
        _check_same_tensors(given)
        self._scored = {side: [dict(found.facts), _state(found)] for side, found in given.items()}
        # Calibrate the tensors that the other side has scores for, or else the tensors that changed.
        names = list(next(iter(given.values())).tensors) if given else self._layout.changed
        wanted = {n: self._layout.shapes[n] for n in names}
        self._sides = {**given, **{s: expected_scores(wanted, 1 + (self.uncertainty is not False)) for s in self._rows}}
        return fused

    @property
    def _choice(self) -> Choice:
        return Choice(self.rule, self.top_share, self.scope, self.temperature)

    def prepare(self, models: Models, passes: Passes) -> Rules:
        """Measure missing importance, then find thresholds and count the elements of each side."""
        assert isinstance(models, FusedModels)
        if self._rows:
            from hf_continual.merging.inputs.run_model import Setting
            from hf_continual.merging.methods.kif.calibration import Measure, calibrated, member_to_run

            measure = Measure(self.beta1, self.beta2, self.order, self.batch_size, self.max_length)
            setting = Setting(self.device, self.calibration_dtype)
            for side, rows in self._rows.items():
                member, names = member_to_run(models.of(side), self.base_model), list(self._sides[side].tensors)
                self._sides[side] = calibrated(
                    side, member, names, rows, measure, setting, passes.folder, self.uncertainty
                )
        self._weighing = weigh(self._choice, self._sides)
        self._told = told_of(models, self._layout, self._weighing, self._sides)
        return lambda _: lambda values, at: values[0]

    def facts(self) -> Mapping[str, Any]:
        """How many elements went to which side."""
        return self._told

    def describe(self, models: Models) -> dict[str, Any]:
        """The choices, and where the importance comes from."""
        return {**self._said(models), **{f"importance_{side}": dict(self._sides[side].facts) for side in SIDES}}

    def asked(self, models: Models) -> Mapping[str, Any]:
        """The choices, the scores that were given, and the rows that other scores are measured on."""
        how = [self.beta1, self.beta2, self.order, self.batch_size, self.max_length, self.calibration_dtype]
        rows = {side: digest_of(found) for side, found in self._rows.items()}
        return {
            **self._said(models), "measured": how if rows else None, "scores": self._scored, "rows": rows,
        }  # fmt: skip

    def _said(self, models: Models) -> dict[str, Any]:
        moved = {"old_from": self.old_from, "old": len(models.members) > 2}
        return {**asdict(self._choice), "uncertainty": self.uncertainty, **moved}

    def known(self, models: Models) -> Mapping[str, Any]:
        """The models by their role in the fusion."""
        assert isinstance(models, FusedModels)
        return {"models": [described(role, m.checkpoint) for role, m in models.roles]}

    def outputs(self, output: Output, notes: list[str]) -> list[OutputTensor]:
        """Make each tensor from the models' values and the scores; adapters are fused factor by factor."""
        notes.extend(self._layout.notes)
        return self._layout.tensors(self._weighing, self._sides, self.old_from)

    def evidence(self, out: Path) -> None:
        """Plot how many elements of each layer went to which side."""
        if layers := self._told["layers"]:
            # matplotlib is imported after the buffers are freed, so that the two do not add up.
            from hf_continual.plots import plot_sides

            plot_sides(layers).savefig(out / HEAT_MAP, dpi=120)

    def result(self, done: MergeResult, models: Models) -> MergeResult:
        """Add the bytes that the passes over the scores read."""
        streamed = sum(t.read_bytes for t in self._layout.tensors(self._weighing, self._sides, self.old_from))
        of_scores = sum(t.nbytes for s in self._sides.values() for both in s.tensors.values() for t in both)
        return replace(done, bytes_read=streamed + of_scores * (3 if self.rule in WEIGHTS else 2))


def _state(scores: Scores) -> list[Any]:
    """Facts that identify files of scores, even if their headers are the same."""
    files = {t.file for both in scores.tensors.values() for t in both}
    return sorted([f.header_sha256, f.size, f.mtime_ns] for f in files)


def _plain(source: Any) -> Any:
    return os.fspath(source) if isinstance(source, os.PathLike) else source


def _check_output(options: Output, adapters: bool) -> None:
    kind = "adapter" if adapters else "model"
    if options.output not in (None, kind):
        raise ValueError(
            f"output={options.output!r}: a fusion element by element keeps the kind of its inputs, here {kind!r}. Leave it out."
        )
    if options.quantized_base != "original":
        raise ValueError(
            f"quantized_base={options.quantized_base!r}: adapters are fused directly, without a base. Leave it out."
        )
    if options.adapter_rank is not None:
        raise ValueError(
            f"adapter_rank={options.adapter_rank}: a fusion keeps the rank of its adapters. Leave it out, or merge_linear."
        )


def _check_same_tensors(sides: Mapping[Side, Scores]) -> None:
    if len(sides) == 2 and (apart := sides["new"].tensors.keys() ^ sides["old"].tensors.keys()):
        raise MergeError(
            f"importance of the new and the old side covers different tensors: {len(apart)} are on one side only "
            f"({some(apart)}). Measure both sides of the same trainable weights."
        )
