"""The pre-registered rules of README.md as functions of result files: claims, the choice of the composition, the goal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Smallest differences that matter: nats per token for losses, fractions for scores.
SMALLEST = {"old_loss": 0.05, "general_loss": 0.02, "op": 0.02, "bwt": 0.02, "learned": 0.02}
LOWER_IS_BETTER = ("old_loss", "general_loss")
SEEDS, DRAWS = 3, 2000
PLAIN = ("sequential", "plain_third", "plain_tenth")  # plain LoRA at three rates
KEPT, LEARNED, TOKENS, FORGOTTEN = 0.8, 0.02, 1.3, 0.1  # limits of the goal; least that plain LoRA must forget

Result = Mapping[str, Any]
Part = tuple[np.ndarray, np.ndarray]  # a value and a weight for each row


def by_seed(results: Sequence[Result], arm: str) -> dict[int, Result]:
    """The results of an arm that ended without an error, by seed."""
    return {r["seed"]: r for r in results if r["arm"] == arm and "error" not in r}


def row_parts(result: Result, measure: str) -> list[Part] | None:
    """What a measure is the mean of: a weighted mean over rows for each task, or for the general text.

    Args:
        result: A result file.
        measure: A key of `SMALLEST`.

    Returns:
        Values and weights of each part; None if it was not measured.
    """
    rows, tasks = result["rows"], result["tasks"]
    last = len(tasks) - 1

    def cell(after: int, task: str, key: str) -> np.ndarray:
        return np.asarray(rows[str(after)][task][key], float)

    try:
        if measure == "general_loss":
            weights = cell(last, "general", "weight")
            return [(cell(last, "general", "score"), weights)]
        if measure == "old_loss":
            values = [cell(last, task, "nll") for task in tasks[:-1]]
        elif measure == "op":
            values = [cell(last, task, "score") for task in tasks]
        elif measure == "learned":
            values = [cell(j, task, "score") for j, task in enumerate(tasks)]
        else:
            values = [cell(last, task, "score") - cell(j, task, "score") for j, task in enumerate(tasks[:-1])]
    except KeyError:
        return None
    return [(v, np.ones(len(v))) for v in values]


def value(result: Result, measure: str) -> float | None:
    """A measure of one run; None if it was not measured."""
    parts = row_parts(result, measure)
    return None if not parts else float(np.mean([np.average(v, weights=w) for v, w in parts]))


def interval(pairs: Sequence[tuple[list[Part], list[Part]]], draws: int = DRAWS) -> tuple[float, float]:
    """95 % bootstrap interval of the mean difference of two arms over seeds.

    Args:
        pairs: For each seed the parts of the one arm and of the other, on the same rows.
        draws: Number of draws.

    Returns:
        Lower and upper bound. Seeds are drawn with replacement, and the rows of each part once for all of them.
    """
    rng = np.random.default_rng(0)
    seeds, parts = len(pairs), len(pairs[0][0])
    found = np.zeros((seeds, draws))
    for k in range(parts):
        size = len(pairs[0][0][k][0])
        counts = rng.multinomial(size, np.full(size, 1 / size), size=draws)
        for s, pair in enumerate(pairs):
            one, other = (counts @ (v * w) / (counts @ w) for v, w in (pair[0][k], pair[1][k]))
            found[s] += (one - other) / parts
    chosen = rng.integers(seeds, size=(draws, seeds))
    means = found[chosen, np.arange(draws)[:, None]].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def compare(results: Sequence[Result], arm: str, against: str, measure: str) -> dict[str, Any] | None:
    """Paired difference of two arms in favour of the first.

    Args:
        results: Results of one data set and use.
        arm: The one arm.
        against: The other.
        measure: A key of `SMALLEST`.

    Returns:
        `by_seed`, their mean `difference`, its `interval`; None with fewer than `SEEDS` common seeds, or without the measure.

    Raises:
        ValueError: If the two arms were not scored on the same number of rows.
    """
    one, other = by_seed(results, arm), by_seed(results, against)
    seeds = sorted(set(one) & set(other))
    pairs = [(row_parts(one[s], measure), row_parts(other[s], measure)) for s in seeds]
    whole = [(a, b) for a, b in pairs if a and b]
    if len(seeds) < SEEDS or len(whole) < len(pairs):
        return None
    for a, b in whole:
        if [len(v) for v, _ in a] != [len(v) for v, _ in b]:
            raise ValueError(
                f"{arm} and {against} were scored on different rows, so they cannot be paired. Run both again."
            )
    sign = -1 if measure in LOWER_IS_BETTER else 1
    means = [[np.mean([np.average(v, weights=w) for v, w in parts]) for parts in pair] for pair in whole]
    differences = [float(sign * (a - b)) for a, b in means]
    low, high = sorted(sign * bound for bound in interval(whole))
    return {"by_seed": differences, "difference": float(np.mean(differences)), "interval": [low, high]}


def verdict(claim: Mapping[str, str], results: Sequence[Result]) -> dict[str, Any]:
    """Evaluate a claim by the pre-registered rule.

    Args:
        claim: `arm`, `against`, `measure`, as in claims.yaml.
        results: Results of one data set and use.

    Returns:
        The comparison, with `verdict`: holds; holds, learns less; does not hold; noise; not measured.
    """
    found = compare(results, claim["arm"], claim["against"], claim["measure"])
    if found is None:
        return {**claim, "verdict": "not measured"}
    low, high = found["interval"]
    large = abs(found["difference"]) >= SMALLEST[claim["measure"]]
    said = "noise"
    if large and low > 0 and min(found["by_seed"]) > 0:
        said = "holds"
    elif large and high < 0 and max(found["by_seed"]) < 0:
        said = "does not hold"
    learned = compare(results, claim["arm"], claim["against"], "learned")
    found["learned"] = None if learned is None else learned["difference"]
    if said == "holds" and learned is not None and learned["difference"] < -SMALLEST["learned"]:
        said = "holds, learns less"
    return {**claim, **found, "verdict": said}


def mean(results: Sequence[Result], arm: str, measure: str) -> float | None:
    """Mean of a measure over an arm's seeds; None if one of them lacks it."""
    values = [value(r, measure) for r in by_seed(results, arm).values()]
    there = [v for v in values if v is not None]
    return float(np.mean(there)) if there and len(there) == len(values) else None


def best_plain(results: Sequence[Result]) -> str | None:
    """Plain LoRA at the rate with the best mean OP; None if a rate is missing."""
    found = {arm: mean(results, arm, "op") for arm in PLAIN}
    scores = {arm: score for arm, score in found.items() if score is not None}
    return max(scores, key=lambda arm: scores[arm]) if len(scores) == len(PLAIN) else None


def kept(results: Sequence[Result], arm: str, plain: str) -> dict[str, Any] | None:
    """The fractions of what a plain arm forgets that an arm keeps, and its cost, as means over common seeds.

    Args:
        results: Results of one data set and use.
        arm: The arm.
        plain: The plain arm.

    Returns:
        `old` and `general`, fractions; `forgotten`, nats of old loss that plain forgets; `learned`, difference; `tokens`, ratio. None
        if something was not measured.
    """
    one, other = by_seed(results, arm), by_seed(results, plain)
    seeds = sorted(set(one) & set(other))
    if not seeds:
        return None
    rows = []
    for s in seeds:
        a, b = one[s], other[s]
        after = [b["nll"][j][j] for j in range(len(b["tasks"]) - 1)]
        base = b["figures"]["general_base"]
        values = [value(r, m) for r in (a, b) for m in ("old_loss", "general_loss", "learned")]
        if None in (*values, *after, base):
            return None
        rows.append([*values, float(np.mean(after)), base])
    old, text, learned, plain_old, plain_text, plain_learned, right_after, base = np.mean(
        np.asarray(rows, float), axis=0
    )
    tokens = [[r[s]["cost"]["tokens"] for s in seeds] for r in (one, other)]
    whole = all(t for arm_tokens in tokens for t in arm_tokens)
    return {
        "old": float((plain_old - old) / (plain_old - right_after)),
        "general": float((plain_text - text) / (plain_text - base)),
        "forgotten": float(plain_old - right_after),
        "learned": float(learned - plain_learned),
        "tokens": float(np.sum(tokens[0]) / np.sum(tokens[1])) if whole else None,
    }


def choose(results: Sequence[Result], candidates: Sequence[str]) -> str | None:
    """The composition, from the tuning results.

    Args:
        results: Results of tuning.
        candidates: Arms to choose from.

    Returns:
        The candidate with the greatest smaller of the two kept fractions, among those that learn enough; None if a run is missing.
    """
    plain = best_plain(results) or next((a for a in PLAIN if by_seed(results, a)), None)
    if plain is None:
        return None
    found = {arm: kept(results, arm, plain) for arm in candidates}
    known = {arm: k for arm, k in found.items() if k is not None}
    if not known or len(known) < len(found):
        return None
    enough = {arm: k for arm, k in known.items() if k["learned"] >= -LEARNED} or known
    return max(enough, key=lambda arm: min(enough[arm]["old"], enough[arm]["general"]))


def goal(results: Sequence[Result], arm: str) -> dict[str, Any]:
    """Whether an arm reaches the goal on a data set.

    Args:
        results: Results of one data set, use: claim.
        arm: The composition.

    Returns:
        `reached`: True, False, or None if it cannot be decided; the plain arm, and the numbers of `kept`.
    """
    plain = best_plain(results)
    numbers = None if plain is None else kept(results, arm, plain)
    few = plain is not None and min(len(by_seed(results, a)) for a in (arm, plain)) < SEEDS
    if numbers is None or few or numbers["tokens"] is None or numbers["forgotten"] < FORGOTTEN:
        return {"arm": arm, "plain": plain, "reached": None, **(numbers or {})}
    reached = (
        min(numbers["old"], numbers["general"]) >= KEPT
        and numbers["learned"] >= -LEARNED
        and numbers["tokens"] <= TOKENS
    )
    return {"arm": arm, "plain": plain, "reached": reached, **numbers}
