"""RECALL: layer-wise weights from representations, then a weighted average (Wang et al., EMNLP 2025, arXiv 2510.20479).

The newest model (the anchor) shows typical samples of its task to all models. A layer in which another model still
represents them like the anchor is averaged freely; where it differs, the anchor keeps more of the weight.

    r[q, l, s] = mean over the tokens of sample s of model q's hidden states after block l
    S[q, l]    = mean_s exp(-||r[q, l, s] - r[a, l, s]||^2 / (2 sigma_l^2))       RBF kernel with the anchor a
    w[., l]    = softmax_q(S[., l] / T)                                           each layer separately
    theta[l]   = sum_q w[q, l] theta_q[l]

No official code is public and the full text was not reachable when this was written: kernel, softmax, mean pooling and
the stages are the paper's; bandwidth, temperature, number of samples and what belongs to a layer are choices, named in
the report. With T = 1 the anchor's weight lies between 1/N and e/(e + N - 1): a gentle re-weighting, not a selection.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from hf_continual.paper import Paper

PAPER = Paper(
    "RECALL: REpresentation-aligned Catastrophic-forgetting ALLeviation via Hierarchical Model Merging",
    "Wang et al.",
    2025,
    "2510.20479",
    "EMNLP 2025",
)

Bandwidth = Literal["anchor_spread", "dim"] | float


def layer_weights(
    reps: np.ndarray,
    anchor: int = -1,
    bandwidth: Bandwidth = "anchor_spread",
    temperature: float = 1.0,
    reference: Literal["anchor", "all_pairs"] = "anchor",
    aggregate: Literal["mean_kernel", "kernel_of_mean"] = "mean_kernel",
) -> dict[str, np.ndarray]:
    """Compute the weights of each model in each layer group, in float64.

    Args:
        reps: Pooled representations, ``[N models, G groups, K samples, D channels]``.
        anchor: Index of the newest model.
        bandwidth: sigma of the kernel: ``"anchor_spread"`` is the median distance between two samples inside the anchor,
            per group, which makes the weights scale-free; ``"dim"`` is sigma^2 = D / 2; a number is sigma.
        temperature: Temperature of the softmax; smaller values sharpen.
        reference: Similarity to the anchor, or the mean over all models as reference.
        aggregate: Mean of the samples' kernels, or one kernel of the samples' means.

    Returns:
        ``sigma2`` [G], ``similarity`` [N, G] in (0, 1], ``weights`` [N, G], which sum to one over the models.

    Raises:
        ValueError: If the shape, the anchor, the bandwidth or the temperature is impossible.
    """
    reps = np.asarray(reps, dtype=np.float64)
    if reps.ndim != 4 or 0 in reps.shape:
        raise ValueError(
            f"reps has shape {reps.shape}; it must be [models, groups, samples, channels], none of them 0."
        )
    number, groups, _, channels = reps.shape
    if not -number <= anchor < number:
        raise ValueError(f"anchor={anchor} is out of range for {number} models.")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive; smaller values sharpen the weights.")
    sigma2_G = _sigma2(reps[anchor], bandwidth)
    # One sample, or samples that are all the same, have no spread.
    sigma2_G = np.where(sigma2_G > 0, sigma2_G, channels / 2.0)
    if aggregate == "kernel_of_mean":
        reps = reps.mean(axis=2, keepdims=True)
    references = [reps[anchor]] if reference == "anchor" else list(reps)
    similarity_NG = np.zeros((number, groups))
    for q in range(number):
        for other in references:
            # Direct differences: the expanded form suffers cancellation where models are alike.
            squared_GK = np.square(reps[q] - other).sum(axis=-1)
            similarity_NG[q] += np.exp(-squared_GK / (2.0 * sigma2_G[:, None])).mean(axis=1) / len(references)
    scaled = similarity_NG / temperature
    exponential = np.exp(scaled - scaled.max(axis=0, keepdims=True))
    return {
        "sigma2": sigma2_G,
        "similarity": similarity_NG,
        "weights": exponential / exponential.sum(axis=0, keepdims=True),
    }


def _sigma2(anchor_GKD: np.ndarray, bandwidth: Bandwidth) -> np.ndarray:
    groups, _, channels = anchor_GKD.shape
    if bandwidth == "anchor_spread":
        return np.array([_spread(anchor_GKD[g]) for g in range(groups)]) ** 2
    if bandwidth == "dim":
        return np.full(groups, channels / 2.0)
    if isinstance(bandwidth, int | float) and bandwidth > 0:
        return np.full(groups, float(bandwidth) ** 2)
    raise ValueError(f"bandwidth={bandwidth!r}: it must be 'anchor_spread', 'dim' or a positive number.")


def _spread(samples_KD: np.ndarray) -> float:
    number = len(samples_KD)
    if number < 2:
        return 0.0
    distances = [np.linalg.norm(samples_KD[s] - samples_KD[u]) for s in range(number) for u in range(s + 1, number)]
    return float(np.median(distances))
