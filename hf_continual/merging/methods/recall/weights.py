"""RECALL's weights for opened models: choose texts, run models on them one after another, compare, softmax."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_continual.bounds import between, one_of, whole_number
from hf_continual.merging.inputs.members import Member
from hf_continual.merging.inputs.structure import EMBED, FINAL
from hf_continual.merging.methods.recall.similarity import layer_weights
from hf_continual.merging.methods.recall.typical_samples import typical_texts


def check_choices(calibration: Any, choices: Mapping[str, Any], with_base: bool, dry_run: bool) -> None:
    """Refuse impossible choices before a model is loaded.

    Args:
        calibration: Texts or rows, or None.
        choices: The options of `merge_with_recall`.
        with_base: Whether the base is the first of the models.
        dry_run: Whether nothing will be calibrated.

    Raises:
        ValueError: If a choice is impossible or the calibration is missing.
    """
    mode = choices["calibration_mode"]
    one_of("recall", "calibration_mode", mode, ("data", "self"))
    one_of("recall", "reference", choices["reference"], ("anchor", "all_pairs"))
    for name in ("num_typical", "pool_size", "max_length"):
        whole_number("recall", name, choices[name])
    whole_number("recall", "seed", choices["seed"], least=0)
    between(
        "recall", "temperature", choices["temperature"], 0, float("inf"), note="Smaller values sharpen the weights."
    )
    layer_weights(np.zeros((1, 1, 1, 1)), 0, choices["bandwidth"], choices["temperature"])
    _nonblock(choices["nonblock"], [1.0], 0, with_base)
    if mode == "data" and calibration is None and not dry_run:
        raise ValueError(
            "calibration is missing: give texts of the newest model's task, or calibration_mode='self' to let the model write "
            "them, or weights=."
        )


def calibrated(
    members: Sequence[Member],
    anchor: int,
    with_base: bool,
    calibration: Any,
    choices: Mapping[str, Any],
    cache: Path,
    run: tuple[Any, ...],
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Find the weights.

    Args:
        members: The models.
        anchor: Index of the newest.
        with_base: Whether the base is the first of the models.
        calibration: Texts or rows of its task.
        choices: The options of `merge_with_recall`.
        cache: Where representations are cached until the merge is published.
        run: Device, dtype and whether memory is low, see `calibration.Setting`.

    Returns:
        Group -> weights, and their other entries in the report.
    """
    # transformers, peft and scikit-learn come with these; a merge with given weights never gets here.
    from hf_continual.merging.inputs.run_model import Setting, cached_representations, load_tokenizer

    started = time.perf_counter()
    setting = Setting(*run)
    cache.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(members[anchor])
    texts, places = typical_texts(members[anchor], tokenizer, calibration, choices, setting, cache)
    if len(texts) == 1:
        warnings.warn(
            "There is only one calibration text: the bandwidth falls back to sqrt(D / 2).", UserWarning, stacklevel=4
        )
    reps_NGKD = np.stack([cached_representations(m, texts, setting, cache) for m in members])
    found = layer_weights(reps_NGKD, anchor, choices["bandwidth"], choices["temperature"], choices["reference"])
    names = [EMBED, *(f"layer.{i}" for i in range(reps_NGKD.shape[1] - 2)), FINAL]
    _warn_degenerate(found, anchor)
    weights = {g: found["weights"][:, i].tolist() for i, g in enumerate(names)}
    for group in (EMBED, FINAL):
        weights[group] = _nonblock(choices["nonblock"], weights[group], anchor, with_base)
    typical = [
        {"index": p, "tokens": len(t), "ids_sha256": hashlib.sha256(json.dumps(list(t)).encode()).hexdigest()}
        for t, p in zip(texts, places, strict=True)
    ]
    return weights, {
        "sigma2": {g: float(found["sigma2"][i]) for i, g in enumerate(names)},
        "similarity": {g: found["similarity"][:, i].tolist() for i, g in enumerate(names)},
        "typical_samples": typical,
        "calibration_seconds": time.perf_counter() - started,
    }


def _nonblock(rule: str, found: list[float], anchor: int, with_base: bool) -> list[float]:
    if rule == "representation":
        return found
    if rule == "uniform":
        return [1.0 / len(found)] * len(found)
    if rule == "anchor":
        return [float(i == anchor) for i in range(len(found))]
    if rule != "base":
        raise ValueError(f"nonblock={rule!r}: it must be 'representation', 'uniform', 'anchor' or 'base'.")
    if not with_base:
        raise ValueError("nonblock='base' needs the base among the models: give include_base=True.")
    return [float(i == 0) for i in range(len(found))]


def _warn_degenerate(found: Mapping[str, np.ndarray], anchor: int) -> None:
    similarity, weights = found["similarity"], found["weights"]
    others = np.delete(similarity, anchor, axis=0)
    if np.abs(weights - 1.0 / len(weights)).max() < 1e-3:
        warnings.warn(
            f"The weights are within 0.001 of equal in every layer (similarities from {others.min():.4f}): this is the uniform "
            f"average. A smaller temperature or bandwidth tells the models apart.",
            UserWarning,
            stacklevel=5,
        )
    elif (far := float((others < 1e-3).all(axis=0).mean())) > 0.5:
        warnings.warn(
            f"In {far:.0%} of the layers every other model's similarity is below 0.001: the bandwidth is too small, and the "
            f"weights are the same in all of them. Use bandwidth='anchor_spread', or a larger number.",
            UserWarning,
            stacklevel=5,
        )
