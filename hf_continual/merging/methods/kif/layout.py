"""The sources of each output tensor of a fusion, and the entries of its report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hf_continual.merging.engine.chunks import OutputTensor, Part
from hf_continual.merging.engine.model_output import model_tensors
from hf_continual.merging.engine.options import Output
from hf_continual.merging.errors import MergeError
from hf_continual.merging.evidence.report import describe_checkpoint
from hf_continual.merging.inputs.checkpoint import Checkpoint
from hf_continual.merging.inputs.structure import EMBED, groups_of
from hf_continual.merging.methods.kif.models import FusedModels, changed_tensors
from hf_continual.merging.methods.kif.rule import GROUPS, SCRATCH, FuseChunk, Weighing
from hf_continual.merging.methods.kif.scores import SIDES, Scores, Side
from hf_continual.tensors.fusion import WEIGHTS


class Layout:
    """The output's tensors before the scores are known.

    Args:
        models: The models.
        options: How it is written.
    """

    def __init__(self, models: FusedModels, options: Output) -> None:
        self.models, self.notes = models, []
        # The rule is set later; here only names, dtypes and shapes matter.
        self.outputs = model_tensors(
            models.members, lambda _: lambda values, at: values[0], options.dtype, options.vocab, self.notes
        )
        self.changed = changed_tensors(models, self.outputs)
        self.shapes = {t.name: t.shape for t in self.outputs if models.sources(t.name)[0].is_float}
        if not self.changed:
            raise MergeError(
                f"{' and '.join(m.name for m in models.members)} hold the same weights: nothing changed, so there is nothing to "
                f"fuse."
            )

    def tensors(self, weighing: Weighing, sides: Mapping[Side, Scores], old_from: str) -> list[OutputTensor]:
        """The output's tensors; tensors without scores are the same in all models and are copied."""
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


def told_of(models: FusedModels, layout: Layout, weighing: Weighing, sides: Mapping[Side, Scores]) -> dict[str, Any]:
    """The results of the passes over the scores, for the report.

    Args:
        models: The models.
        layout: The output's tensors.
        weighing: Thresholds and counts.
        sides: The scores.

    Returns:
        How many elements went to which side, in total, by layer and by tensor; and what decided it.
    """
    whole = weighing.choice.rule in WEIGHTS
    keys = ("elements", *(GROUPS if whole else ("new_weight",)))
    groups = layers_of(list(weighing.counts), models.start.checkpoint.config)
    everything: dict[str, float] = {}
    layers: dict[str, dict[str, float]] = {}
    tensors: dict[str, Any] = {}
    for name, counts in weighing.counts.items():
        found = dict(zip(keys, (sides["new"].tensors[name][0].numel, *counts), strict=True))
        tensors[name] = _shown(found, whole) | _threshold_of(weighing, name)
        for summed in (everything, layers.setdefault(groups[name], {})):
            for key, value in found.items():
                summed[key] = summed.get(key, 0) + value
    return {
        "all": _shown(everything, whole),
        "layers": {g: _shown(layers[g], whole) for g in sorted(layers, key=_from_the_input)},
        "tensors": tensors,
        **_found(weighing),
        "copied": [t.name for t in layout.outputs if t.name not in weighing.counts],
    }


def described(role: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """One model of the report."""
    facts = {**describe_checkpoint(checkpoint), "role": role}
    if checkpoint.is_adapter:
        facts |= {"rank": checkpoint.config.get("r"), "alpha": checkpoint.config.get("lora_alpha")}
    return facts


def layers_of(names: Sequence[str], config: Mapping[str, Any]) -> dict[str, str]:
    """The layer of each tensor: from a full model's configuration, else by the first number in its name."""
    try:
        return groups_of(names, config)
    except MergeError:
        found = {n: re.match(r"(?:base_model\.model\.)?(.*?\.\d+)\.", n) for n in names}
        return {n: m[1] if m else "others" for n, m in found.items()}


def _from_the_input(layer: str) -> tuple[int, str, int]:
    """Sort key: embeddings first, blocks by number, everything after the blocks last."""
    prefix, _, number = layer.rpartition(".")
    return (0 if layer == EMBED else 1 if number.isdigit() else 2, prefix, int(number) if number.isdigit() else 0)


def _shown(counts: Mapping[str, float], whole: bool) -> dict[str, Any]:
    """Return counts unchanged; a sum of weights as its mean."""
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
