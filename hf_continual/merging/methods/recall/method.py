"""RECALL as a merge method: one weight per model and layer, found from representations or given.

See `hf_continual.merging.methods.recall.similarity` for the formulas.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from hf_continual.merging.engine.average import Average
from hf_continual.merging.engine.job import digest_of
from hf_continual.merging.engine.options import Output
from hf_continual.merging.engine.passes import Passes
from hf_continual.merging.engine.result import MergeResult
from hf_continual.merging.inputs.checkpoint import Checkpoint
from hf_continual.merging.inputs.members import Member, open_members
from hf_continual.merging.inputs.structure import groups_of, ordered
from hf_continual.merging.methods.base import MergeMethod, Models, Rules
from hf_continual.merging.methods.recall.given_weights import read_weights, warn_other_base
from hf_continual.merging.methods.recall.heat_map import save_heat_map
from hf_continual.merging.methods.recall.similarity import PAPER, Bandwidth
from hf_continual.merging.methods.recall.weights import calibrated, check_choices
from hf_continual.paper import Paper

RECALL_REPORT, HEAT_MAP = "recall_report.json", "recall_weights.png"
REPORTS = (RECALL_REPORT, MergeMethod.report)  # reports that name a previous merge
CHOICES = (
    "include_base", "num_typical", "pool_size", "max_length", "seed", "bandwidth", "temperature", "reference", "nonblock",
    "calibration_mode",
)  # fmt: skip


@dataclass(frozen=True)
class RecallMergeResult(MergeResult):
    """The result of a merge by RECALL. On top of `MergeResult`:

    Args:
        groups: ``embed``, ``layer.0`` ..., ``final``; or the groups that given weights name.
        weights: ``[N, G]``, float64.
        similarity: ``[N, G]``, or None for given weights.
        sigma2: ``[G]``, or None for given weights.
        model_names: The models in the order of the weights.
        anchor: Index of the newest model among them.
    """

    groups: tuple[str, ...] = ()
    weights: np.ndarray | None = None
    similarity: np.ndarray | None = None
    sigma2: np.ndarray | None = None
    model_names: tuple[str, ...] = ()
    anchor: int = -1


@dataclass
class Recall(MergeMethod):
    """Merge models of a sequence of tasks with one weight per model and layer, found from representations.

    Args:
        calibration: Texts of the newest task, or rows with text, messages, or prompt and completion.
        calibration_mode: ``"self"`` lets the newest model write the texts.
        anchor: The newest model, by index or name.
        include_base: Whether the base is one of the models; ``"auto"``: with a single expert only.
        num_typical: Number of texts that all models see, one per cluster.
        pool_size: Number of texts that are clustered, evenly spaced in `calibration`.
        max_length: Tokens per text.
        seed: Seed of the clustering, and of the texts of ``"self"``.
        bandwidth: sigma of the similarity, see `layer_weights`.
        temperature: Temperature of the softmax over models.
        reference: What models are compared with: the anchor, or all models.
        nonblock: Weights of embeddings, final norm and head: from their representations, equal, the anchor alone, or
            the base alone.
        weights: A ``recall_report.json`` to reuse, or one list per group (``"embed"``, ``"layer.0"``, ..., ``"final"``;
            ``"default"`` for those not named); skips calibration.
        device: Where models run for calibration; None: the accelerator if there is one.
        calibration_dtype: dtype they run in; None: the checkpoint's, on a CPU never float16.
        low_memory: Whether to read their blocks from disk as needed.
    """

    calibration: Any = field(default=None, repr=False, metadata={"rows": True})
    calibration_mode: Literal["data", "self"] = field(
        default="data", metadata={"flags": {"--self-calibration": "self"}}
    )
    anchor: int | str = -1
    include_base: bool | Literal["auto"] = "auto"
    num_typical: int = 20
    pool_size: int = 512
    max_length: int = 512
    seed: int = 0
    bandwidth: Bandwidth = "anchor_spread"
    temperature: float = 1.0
    reference: Literal["anchor", "all_pairs"] = "anchor"
    nonblock: Literal["representation", "uniform", "anchor", "base"] = "representation"
    weights: Mapping[str, Sequence[float]] | str | os.PathLike[str] | None = None
    device: str | None = None
    calibration_dtype: str | None = None
    low_memory: bool = False
    _groups: dict[str, str] = field(default_factory=dict, init=False, repr=False)
    _weights: dict[str, list[float]] = field(default_factory=dict, init=False, repr=False)
    _found: Mapping[str, Any] = field(default_factory=dict, init=False, repr=False)
    _names: list[str] = field(default_factory=list, init=False, repr=False)

    name: ClassVar[str] = "recall"
    paper: ClassVar[Paper] = PAPER
    linear: ClassVar[bool] = True
    report: ClassVar[str] = RECALL_REPORT
    image: ClassVar[str | None] = HEAT_MAP

    @property
    def looks(self) -> bool:  # pyrefly: ignore[bad-override]
        """Whether the weights have to be found."""
        return self.weights is None

    def open(
        self, models: Sequence[str | os.PathLike[str]], base: str | os.PathLike[str] | None, output: Output
    ) -> Models:
        """Open the models, with the base first if it is one of them; then check the choices, which may need it."""
        experts, full = open_members(models, base, output.quantized_base)
        place, with_base = self._place(experts), self._with_base(experts, full)
        if not self.looks:
            return _models(experts, full, place, with_base)
        if full is not None and full.seen_as is not None and self.low_memory:
            raise ValueError(
                "low_memory=True reads blocks from disk unchanged, but quantized_base changes their values. Leave one out."
            )
        check_choices(self.calibration, self._choices(), with_base, output.dry_run)
        return _models(experts, full, place, with_base)

    def check(self, models: Models) -> None:
        """Find the group of each tensor, and the weights of each if they are given; equal weights stand in for those to be found."""
        names = list(dict.fromkeys(n for m in models.members for n in m.names))
        config, self._names = models.members[0].checkpoint.config, [m.name for m in models.members]
        if self.weights is None:
            self._groups = groups_of(names, config)
            equal = [1 / len(models.members)] * len(models.members)
            self._weights = {g: equal for g in ordered(self._groups.values())}
            return
        self._groups, self._weights = read_weights(self.weights, len(self._names), names, config, self._names)
        warn_other_base(self.weights, models.base)

    def prepare(self, models: Models, passes: Passes) -> Rules:
        """Run the texts through the models, one after another, unless the weights are given."""
        if self.looks:
            run = (self.device, self.calibration_dtype, self.low_memory)
            self._weights, self._found = calibrated(
                models.members, models.newest, models.from_base, self.calibration, self._choices(), passes.folder, run
            )
        rules = {g: Average(tuple(w)) for g, w in self._weights.items()}
        return lambda name: rules[self._groups[name]]

    def facts(self) -> Mapping[str, Any]:
        """The weights, and what they follow from."""
        return {"weights": {g: list(w) for g, w in self._weights.items()}, **self._found}

    def describe(self, models: Models) -> dict[str, Any]:
        """The choices; they do not apply to given weights."""
        return self._choices() if self.looks else {}

    def asked(self, models: Models) -> Mapping[str, Any]:
        """The choices and the texts, or the weights."""
        if not self.looks:
            return {"weights": self._weights}
        return {**self._choices(), "anchor": models.newest, "calibration": digest_of(self.calibration)}

    def known(self, models: Models) -> Mapping[str, Any]:
        """Groups, the newest model, and whether one of the models is itself a merge."""
        before = any((m.own.folder / name).is_file() for m in models.members for name in REPORTS)
        return {
            "groups": list(self._weights),
            "weights": {g: list(w) for g, w in self._weights.items()},
            "anchor": models.members[models.newest].name,
            "mode": "running" if before else "joint",
        }

    def evidence(self, out: Path) -> None:
        """Plot the weights."""
        save_heat_map(self._weights, self._names, out / HEAT_MAP)

    def result(self, done: MergeResult, models: Models) -> RecallMergeResult:
        """Add the weights, as arrays."""
        order = tuple(done.report["weights"])
        return RecallMergeResult(
            **{name: getattr(done, name) for name in MergeResult.__dataclass_fields__},
            groups=order,
            weights=_array(done.report["weights"], order),
            similarity=_array(done.report.get("similarity"), order),
            sigma2=_array(done.report.get("sigma2"), order),
            model_names=tuple(self._names),
            anchor=models.newest,
        )

    def _choices(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in CHOICES}

    def _place(self, experts: Sequence[Member]) -> int:
        """Index of the newest model among those that were named."""
        called, anchor = [m.name for m in experts], self.anchor
        if isinstance(anchor, str):
            if anchor not in called:
                raise ValueError(f"anchor={anchor!r} is not one of the models: {', '.join(called)}.")
            anchor = called.index(anchor)
        if not -len(experts) <= anchor < len(experts):
            raise ValueError(f"anchor={anchor} is out of range: there are {len(experts)} models.")
        return anchor % len(experts)

    def _with_base(self, experts: Sequence[Member], full: Checkpoint | None) -> bool:
        with_base = len(experts) == 1 if self.include_base == "auto" else bool(self.include_base)
        alone = experts[0].name if len(experts) == 1 else None
        if with_base and full is None:
            raise ValueError(
                "include_base=True needs base=."
                if alone is None
                else f"{alone} is the only model, and there is no base to merge it with: give base=, or a second model."
            )
        if alone is not None and not with_base:
            raise ValueError(f"{alone} is the only model: with include_base=False there is nothing to merge it with.")
        return with_base


def _models(experts: Sequence[Member], full: Checkpoint | None, place: int, with_base: bool) -> Models:
    first = [Member(full)] if with_base and full is not None else []
    return Models((*first, *experts), full, with_base, place + len(first))


def _array(by_group: Mapping[str, Any] | None, groups: Sequence[str]) -> np.ndarray | None:
    return None if by_group is None else np.array([by_group[g] for g in groups]).T
