"""The choices that RECALL's paper leaves open, as one function of saved representations: choices in, weights out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hf_continual.merging.methods.recall.similarity import layer_weights
from hf_continual.merging.methods.recall.typical_samples import typical_samples

States = Mapping[str, np.ndarray]  # "block mean text" and so on -> [groups, texts, channels]


@dataclass(frozen=True)
class Variant:
    """One choice for each open question; the defaults are those of `merge_with_recall`.

    Args:
        anchor: The model whose similarity counts and that selects the typical samples: the newest model, or the first (in a chain the
            merge so far, ``anchor=0`` of `merge_with_recall`).
        reference: Similarity to the newest model, or the mean over all pairs.
        aggregate: Mean of the samples' kernels, or the kernel of their means.
        pool: Mean over tokens, or the last token.
        part: The whole text, or the prompt alone.
        cluster: Where typical samples are found: after the final norm (pooled as above), in the middle block, or at the
            last token of the prompt.
        level: One weight per block, or per module from its own output.
        temperature: Temperature of the softmax; "spread": the standard deviation of a layer's similarities over models. Below zero it
            is no longer RECALL: models that differ get more. For comparison only.
        centred: Whether to subtract each model's mean over the samples first.
        bandwidth: Bandwidth of the kernel, as in `layer_weights`.
    """

    anchor: Literal["newest", "first"] = "newest"
    reference: Literal["anchor", "all_pairs"] = "anchor"
    aggregate: Literal["mean_kernel", "kernel_of_mean"] = "mean_kernel"
    pool: Literal["mean", "last"] = "mean"
    part: Literal["text", "prompt"] = "text"
    cluster: Literal["final", "middle", "prompt end"] = "final"
    level: Literal["layer", "module"] = "layer"
    temperature: float | Literal["spread"] = 1.0
    centred: bool = False
    bandwidth: Any = "anchor_spread"


def typical(states: States, variant: Variant, number: int, seed: int) -> np.ndarray:
    """Indices of the typical samples among the newest model's texts."""
    name = f"block {variant.pool} {variant.part}"
    points = {"final": (name, -1), "middle": (name, 16), "prompt end": ("block last prompt", -1)}[variant.cluster]
    return typical_samples(states[points[0]][points[1]].astype(float), number, seed)


def weights_by_name(
    models: Sequence[States], names: Sequence[str], variant: Variant, number: int = 20, seed: int = 0
) -> dict[str, list[float]]:
    """A parameter's name -> weight of each model.

    Args:
        models: Representations of each model, of the same texts, the newest last.
        names: Parameters, such as ``model.layers.3.self_attn.q_proj.weight``.
        variant: The choices.
        number: Number of typical samples.
        seed: Seed of the clustering.
    """
    anchor = -1 if variant.anchor == "newest" else 0
    picked = typical(models[anchor], variant, number, seed)
    kinds = ["block"] if variant.level == "layer" else ["q_proj", "v_proj"]
    found = {}
    for kind in kinds:
        reps = np.stack([m[f"{kind} {variant.pool} {variant.part}"][:, picked] for m in models]).astype(np.float64)
        if variant.centred:
            reps -= reps.mean(axis=2, keepdims=True)
        found[kind] = _weights(reps, anchor, variant)
    by_name = {}
    for name in names:
        layer, module = int(name.split(".")[2]), name.split(".")[-2]
        # The first group of blocks is the input of the first one.
        column = found["block"][:, layer + 1] if variant.level == "layer" else found[module][:, layer]
        by_name[name] = column.tolist()
    return by_name


def _weights(reps_NGKD: np.ndarray, anchor: int, variant: Variant) -> np.ndarray:
    found = layer_weights(reps_NGKD, anchor, variant.bandwidth, 1.0, variant.reference, variant.aggregate)
    similarity_NG = found["similarity"]
    spread = variant.temperature == "spread"
    scaled = similarity_NG / (
        np.maximum(similarity_NG.std(axis=0, keepdims=True), 1e-6) if spread else variant.temperature
    )
    raised = np.exp(scaled - scaled.max(axis=0, keepdims=True))
    return raised / raised.sum(axis=0, keepdims=True)
