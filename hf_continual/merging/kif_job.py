"""The engine's job of a fusion: what each output tensor is made of, what the report says, and the picture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_continual.merging.chunks import OutputTensor, Part
from hf_continual.merging.errors import MergeError
from hf_continual.merging.job import Job
from hf_continual.merging.kif_importance import SIDES, Scores, Side
from hf_continual.merging.kif_models import Models, changed_tensors
from hf_continual.merging.kif_rule import GROUPS, SCRATCH, FuseChunk, Weighing
from hf_continual.merging.model_output import model_tensors
from hf_continual.merging.options import Output
from hf_continual.merging.report import describe_checkpoint
from hf_continual.merging.structure import EMBED, groups_of
from hf_continual.paper import Paper
from hf_continual.tensors.fusion import WEIGHTS

KIF_REPORT, HEAT_MAP = "kif_report.json", "kif_sides.png"
PAPER = Paper(
    "Recurrent Knowledge Identification and Fusion for Language Model Continual Learning",
    "Feng et al.",
    2025,
    "2502.17510",
    "ACL 2025",
)


class Layout:
    """The output's tensors before the scores are known.

    Args:
        models: The models.
        options: How it is written.
    """

    def __init__(self, models: Models, options: Output) -> None:
        self.models, self.notes = models, []
        # The rule is put in later; here only names, types and shapes count.
        self.outputs = model_tensors(
            models.members, lambda _: lambda values, at: values[0], options.dtype, options.vocab, self.notes
        )
        self.changed = changed_tensors(models, self.outputs)
        self.shapes = {t.name: t.shape for t in self.outputs if models.sources(t.name)[0].is_float}
        if not self.changed:
            raise MergeError(
                f"{' and '.join(m.name for m in models.members)} hold the same weights: nothing moved, so there is nothing to "
                f"fuse."
            )

    def tensors(self, weighing: Weighing, sides: Mapping[Side, Scores], old_from: str) -> list[OutputTensor]:
        """The output's tensors; what has no scores is the same in all models and is copied."""
        place = None if self.models.old is None else ("base", "new").index(old_from)
        function = FuseChunk(weighing, sides, place)
        laid_out = []
        for output in self.outputs:
            sources = self.models.sources(output.name)
            if output.name in sides["new"].tensors:
                scored = [t for side in SIDES for t in sides[side].tensors[output.name]]
                part = Part((*sources, *scored), function, SCRATCH)
            elif sources[0].is_float:
                part = Part(sources[:1], None if sources[0].dtype == output.dtype else lambda chunk: chunk.values[0])  # pyrefly: ignore[bad-argument-type]
            else:
                part = output.parts[0]
            laid_out.append(OutputTensor(output.name, output.dtype, output.shape, (part,)))
        return laid_out


def fuse_job(
    layout: Layout,
    weighing: Weighing,
    sides: Mapping[Side, Scores],
    options: Mapping[str, Any],
    asked: Mapping[str, Any] | None = None,
) -> Job:
    """What the engine writes.

    Args:
        layout: The output's tensors.
        weighing: What the passes over the scores found.
        sides: The scores.
        options: The options of the fusion, for the report.
        asked: What the fusion was asked for, see `Job`.

    Returns:
        The job.
    """
    models, choice = layout.models, weighing.choice
    told = {**options, **{f"importance_{side}": dict(sides[side].facts) for side in SIDES}}
    facts: dict[str, Any] = {"models": [_described(role, m.checkpoint) for role, m in models.roles]}
    layers: dict[str, dict[str, float]] = {}
    if weighing.counts:
        sizes = {n: t[0].numel for n, t in sides["new"].tensors.items()}
        groups = layers_of(list(weighing.counts), models.base.checkpoint.config)
        keys = GROUPS if choice.rule in WEIGHTS else ("new_weight",)
        totals: dict[str, dict[str, float]] = {"all": {}}
        for name, counts in weighing.counts.items():
            for summed in (totals["all"], layers.setdefault(groups[name], {})):
                for key, value in zip(("elements", *keys), (sizes[name], *counts), strict=True):
                    summed[key] = summed.get(key, 0) + value
        whole = choice.rule in WEIGHTS
        facts["all"] = _shown(totals["all"], whole)
        facts["layers"] = {g: _shown(layers[g], whole) for g in sorted(layers, key=_from_the_input)}
        facts["tensors"] = {
            n: _shown(dict(zip(("elements", *keys), (sizes[n], *c), strict=True)), whole) | _threshold_of(weighing, n)
            for n, c in weighing.counts.items()
        }
        facts |= _found(weighing)
        facts["copied"] = [t.name for t in layout.outputs if t.name not in weighing.counts]

    def draw(out: Path) -> None:
        # matplotlib is imported when the buffers are gone, so that the two do not add up.
        from hf_continual.plots import plot_sides

        plot_sides(facts["layers"]).savefig(out / HEAT_MAP, dpi=120)

    def tensors(_: Output, notes: list[str]) -> list[OutputTensor]:
        notes.extend(layout.notes)
        return layout.tensors(weighing, sides, str(options["old_from"]))

    return Job(
        "kif", PAPER, models.members, None, lambda _: lambda values, at: values[0], told, newest=1, report=KIF_REPORT,
        facts=facts, evidence=draw if layers else None, tensors=tensors, image=HEAT_MAP if layers else None, asked=asked,
    )  # fmt: skip


def layers_of(names: Sequence[str], config: Mapping[str, Any]) -> dict[str, str]:
    """The layer of each tensor: as a full model's configuration tells, else by the first number in its name."""
    try:
        return groups_of(names, config)
    except MergeError:
        found = {n: re.match(r"(?:base_model\.model\.)?(.*?\.\d+)\.", n) for n in names}
        return {n: m[1] if m else "others" for n, m in found.items()}


def _from_the_input(layer: str) -> tuple[int, str, int]:
    """Sorts embeddings first, blocks by number, and what stands behind them last."""
    prefix, _, number = layer.rpartition(".")
    return (0 if layer == EMBED else 1 if number.isdigit() else 2, prefix, int(number) if number.isdigit() else 0)


def _described(role: str, checkpoint: Any) -> dict[str, Any]:
    facts = {**describe_checkpoint(checkpoint), "role": role}
    if checkpoint.is_adapter:
        facts |= {"rank": checkpoint.config.get("r"), "alpha": checkpoint.config.get("lora_alpha")}
    return facts


def _shown(counts: Mapping[str, float], whole: bool) -> dict[str, Any]:
    """Counts as they are; a sum of weights as its mean."""
    if whole:
        return {k: int(v) for k, v in counts.items()}
    return {"elements": int(counts["elements"]), "new_weight": counts["new_weight"] / max(counts["elements"], 1)}


def _threshold_of(weighing: Weighing, name: str) -> dict[str, Any]:
    if weighing.choice.scope != "tensor" or name not in weighing.thresholds:
        return {}
    return {"thresholds": dict(zip(SIDES, map(float, weighing.thresholds[name]), strict=True))}


def _found(weighing: Weighing) -> dict[str, Any]:
    if weighing.shares:
        return {}
    if weighing.ranges:
        ends = [[float(low), float(high)] for low, high in weighing.ranges]
        return {"ranges": dict(zip(SIDES, ends, strict=True))}
    if weighing.choice.scope == "tensor":
        return {}
    return {"thresholds": dict(zip(SIDES, map(float, next(iter(weighing.thresholds.values()))), strict=True))}
