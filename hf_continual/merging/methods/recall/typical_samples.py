"""The texts that all models see: per cluster of the new task, the one nearest to the centre; or written by the newest model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_continual.merging.inputs.members import Member

if TYPE_CHECKING:
    from hf_continual.merging.inputs.run_model import Setting


def first_centres(points_ND: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Choose centres by k-means++: each is drawn in proportion to its squared distance from those before.

    Drawn here rather than by scikit-learn, whose draws may change between versions; a seed must keep its meaning.

    Args:
        points_ND: The points, float64.
        number: Number of centres.
        seed: Seed of numpy's PCG64.

    Returns:
        The centres; fewer if there are fewer different points.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    centres = [points_ND[int(generator.integers(len(points_ND)))]]
    while len(centres) < number:
        squared = np.min([np.square(points_ND - c).sum(axis=1) for c in centres], axis=0)
        if (total := squared.sum()) == 0:
            break
        drawn = int(np.searchsorted(np.cumsum(squared), generator.random() * total, side="right"))
        centres.append(points_ND[min(drawn, len(points_ND) - 1)])
    return np.stack(centres)


def typical_samples(points_ND: np.ndarray, number: int, seed: int = 0) -> np.ndarray:
    """Choose the rows that represent the clusters, in ascending order.

    Args:
        points_ND: One representation per text.
        number: Number of clusters, and so the most rows that are returned.
        seed: Seed of the first centres.

    Returns:
        Row numbers; all rows if there are no more than `number`.
    """
    if number >= len(points_ND):
        return np.arange(len(points_ND))
    from sklearn.cluster import KMeans  # not on the path of a merge with given weights

    points_ND = np.asarray(points_ND, dtype=np.float64)
    centres = first_centres(points_ND, number, seed)
    found = KMeans(len(centres), init=centres, n_init=1, max_iter=100, tol=0.0, algorithm="lloyd").fit(points_ND)
    rows = set()
    for cluster, centre in enumerate(found.cluster_centers_):
        members = np.flatnonzero(found.labels_ == cluster)
        if len(members):
            rows.add(int(members[np.square(points_ND[members] - centre).sum(axis=1).argmin()]))
    return np.array(sorted(rows))


def typical_texts(
    anchor: Member, tokenizer: Any, calibration: Any, choices: Mapping[str, Any], setting: Setting, cache: Path
) -> tuple[list[list[int]], list[int]]:
    """Token ids of the typical texts, and their positions in the calibration.

    Args:
        anchor: The newest model.
        tokenizer: Its tokenizer.
        calibration: Texts or rows; ignored if the model writes them.
        choices: The options of `merge_with_recall`.
        setting: How models are run.
        cache: Where representations are cached.

    Returns:
        Ids and positions.
    """
    from hf_continual.data.self_generated import own_words
    from hf_continual.merging.inputs.run_model import cached_representations, loaded, token_ids

    number, seed = choices["num_typical"], choices["seed"]
    if choices["calibration_mode"] == "self":
        with loaded(anchor, setting) as model:
            calibration = own_words(model, tokenizer, number, min(128, choices["max_length"]), seed, batch_size=number)
    texts, places = token_ids(calibration, tokenizer, choices["pool_size"], choices["max_length"])
    if choices["calibration_mode"] == "self" or len(texts) <= number:
        return texts, places
    last_ND = cached_representations(anchor, texts, setting, cache)[-1]
    rows = typical_samples(last_ND.astype(float), number, seed)
    return [texts[i] for i in rows], [places[i] for i in rows]
