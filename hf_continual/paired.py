"""Is one run better than another by more than chance? Tests on the rows that both were scored on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hf_continual.intervals import Interval, combined_interval, is_share


@dataclass(frozen=True)
class PairedTest:
    """Two runs on the same rows: is the second better by more than chance?

    Args:
        difference: Mean score of the second minus that of the first; for several tasks the mean over tasks.
        interval: Interval of the difference, 95 % by default; None if the rows say nothing about it.
        p_value: Probability of a difference at least as large, in either direction, if both were equally good.
        n: Number of rows.
        better: Rows on which the second scored higher.
        worse: Rows on which it scored lower.
        test: Test that computed the p-value.
    """

    difference: float
    interval: Interval | None
    p_value: float
    n: int
    better: int
    worse: int
    test: str

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)


def paired_test(
    first: Mapping[str, Sequence[float]],
    second: Mapping[str, Sequence[float]],
    draws: int = 9999,
    seed: int = 0,
    confidence: float = 0.95,
) -> PairedTest:
    """Compare two runs by their scores of the same rows.

    Args:
        first: One score per row, by task.
        second: The same tasks and rows, in the same order.
        draws: Draws of the sign-flip test and of the bootstrap, if scores are not 0 or 1.
        seed: Seed of the draws.
        confidence: Probability that such intervals hold the true difference.

    Returns:
        McNemar's exact test over all rows if every row is right or wrong, with Newcombe's interval; otherwise a test
        that flips signs of the rows' differences, with a bootstrapped interval.

    Raises:
        ValueError: If tasks or numbers of rows differ, or there are no rows.
    """
    if list(first) != list(second) or any(len(first[t]) != len(second[t]) for t in first):
        sizes = [", ".join(f"{t}: {len(v)}" for t, v in run.items()) for run in (first, second)]
        raise ValueError(
            f"the runs have different tasks or rows ({sizes[0]} and {sizes[1]}); only the same rows can be paired."
        )
    changes = {t: np.asarray(second[t], float) - np.asarray(first[t], float) for t in first}
    every = np.concatenate([np.zeros(0), *changes.values()])
    if not len(every) or not all(map(len, changes.values())):
        raise ValueError("there are no rows to compare.")
    difference = float(np.mean([c.mean() for c in changes.values()]))
    better, worse = int((every > 0).sum()), int((every < 0).sum())
    if all(is_share(run[t]) for run in (first, second) for t in first):
        from scipy import stats

        parts = [(sign / len(first), run[t]) for t in first for sign, run in ((1.0, second), (-1.0, first))]
        interval = combined_interval(parts, confidence, [i for i in range(len(first)) for _ in range(2)])
        p_value = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
        return PairedTest(difference, interval, p_value, len(every), better, worse, "McNemar, exact")
    # Each row has the weight it has in its task's mean.
    scaled = np.concatenate([c / len(c) / len(changes) for c in changes.values()])
    return PairedTest(
        difference, _drawn(changes, draws, seed, confidence), _by_signs(scaled, draws, seed), len(every), better, worse, "signs of the rows' differences"
    )  # fmt: skip


def _by_signs(scaled: np.ndarray, draws: int, seed: int) -> float:
    if not scaled.any():
        return 1.0
    from scipy import stats

    found = stats.permutation_test(
        (scaled,), np.sum, permutation_type="samples", n_resamples=draws, vectorized=True, rng=np.random.default_rng(seed)
    )  # fmt: skip
    return float(found.pvalue)


def _drawn(changes: Mapping[str, np.ndarray], draws: int, seed: int, confidence: float) -> Interval | None:
    """Percentiles of the mean over tasks of differences, with rows resampled within each task."""
    if all(len(set(c.tolist())) < 2 for c in changes.values()):
        return None
    rng = np.random.default_rng(seed)
    total = np.zeros(draws)
    for change in changes.values():
        counts = rng.multinomial(len(change), np.full(len(change), 1 / len(change)), size=draws)
        total += counts @ change / len(change) / len(changes)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(total, [tail, 100 - tail])
    return float(low), float(high)
