"""Intervals and tests against formulas written out, at the edges, and in simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_continual.intervals import (
    coefficients,
    combined_interval,
    figure_intervals,
    mean_interval,
    share_interval,
)
from hf_continual.metrics import SUMMARY, AccuracyMatrix
from hf_continual.paired import paired_test

Z = 1.959963984540054


def wilson(x, n):
    """Wilson's interval from his formula."""
    p = x / n
    centre, reach = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n * n))
    return (centre - reach) / (1 + Z**2 / n), (centre + reach) / (1 + Z**2 / n)


@pytest.mark.parametrize(
    ("x", "n", "low", "high"),
    [
        # 16 of 16: n / (n + z^2) = 16 / 19.8415 = 0.8064; 0 of 16 is its mirror.
        (16, 16, 0.8064, 1.0),
        (0, 16, 0.0, 0.1936),
        # 1 of 1: 1 / 4.8415; 50 of 100: (0.5 + 0.0192 -+ 0.0980 * sqrt(1.0384)) / 1.0384.
        (1, 1, 0.2065, 1.0),
        (50, 100, 0.4038, 0.5962),
    ],
)
def test_wilson(x, n, low, high):
    assert share_interval(x, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert share_interval(x, n) == (pytest.approx(wilson(x, n)[0]), pytest.approx(wilson(x, n)[1]))
    assert mean_interval([1.0] * x + [0.0] * (n - x)) == share_interval(x, n)


def test_means_that_are_not_fractions():
    """0.2, 0.4, 0.6: mean 0.4, sd 0.2, t with 2 degrees of freedom 4.3027: 0.4 -+ 4.3027 * 0.2 / sqrt(3)."""
    low, high = mean_interval([0.2, 0.4, 0.6])
    assert low == pytest.approx(0.4 - 4.30265 * 0.2 / math.sqrt(3), abs=1e-5) and high == pytest.approx(0.8 - low)
    assert mean_interval([0.5]) is None and mean_interval([0.5, 0.5]) is None and mean_interval([]) is None


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=4, max_size=4), st.booleans())
def test_figures_are_the_sums_that_their_coefficients_say(rows, lower):
    matrix = AccuracyMatrix(rows[1:], rows[0], lower)
    for name in SUMMARY:
        total = sum(c * matrix.score(*place) for place, c in coefficients(name, matrix).items())
        assert total == pytest.approx(matrix.summary[name], abs=1e-12), name


def test_one_task_is_wilson_and_all_right_is_not_certain():
    bounds = figure_intervals([{(0, 0): [1.0] * 16}], 1)
    assert bounds["overall_performance"] == pytest.approx(wilson(16, 16))
    assert bounds["backward_transfer"] is None and bounds["forward_transfer"] is None
    # Two tasks with separate rows: half of each one's width, squared and added.
    runs = [{(0, 0): [1.0] * 16, (1, 0): [1.0] * 16, (1, 1): [1.0] * 30}]
    low, high = figure_intervals(runs, 2)["overall_performance"]
    a, b = 1 - wilson(16, 16)[0], 1 - wilson(30, 30)[0]
    assert (low, high) == (pytest.approx(1 - math.sqrt(a * a + b * b) / 2), 1.0)


def test_a_difference_on_the_same_rows_is_newcombes():
    """Newcombe's example: 36 right both times, 12 only the first time, 2 only the second, none wrong both times. Method 8, written out."""
    before = [1.0] * 48 + [0.0] * 2
    after = [1.0] * 36 + [0.0] * 12 + [1.0] * 2
    phi = (36 * 0 - 12 * 2) / math.sqrt(48 * 2 * 38 * 12)
    (l1, u1), (l2, u2) = wilson(48, 50), wilson(38, 50)
    p1, p2 = 48 / 50, 38 / 50
    d = p2 - p1
    below = math.sqrt((p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u1 - p1) + (u1 - p1) ** 2)
    above = math.sqrt((u2 - p2) ** 2 - 2 * phi * (u2 - p2) * (p1 - l1) + (p1 - l1) ** 2)
    bounds = figure_intervals([{(0, 0): before, (1, 0): after, (1, 1): [1.0]}], 2)
    assert bounds["backward_transfer"] == (pytest.approx(d - below), pytest.approx(d + above))
    assert bounds["forgetting"] == (pytest.approx(-d - above), pytest.approx(-d + below))
    # No row of 16 changed: the drop may still be up to 19 points.
    kept = figure_intervals([{(0, 0): [1.0] * 16, (1, 0): [1.0] * 16, (1, 1): [1.0]}], 2)
    assert kept["backward_transfer"] == (pytest.approx(-0.1936, abs=5e-5), pytest.approx(0.1936, abs=5e-5))


def test_scores_that_are_not_fractions_are_bootstrapped_and_edges_among_them_stay_wide():
    half = [0.25, 0.5, 0.75, 1.0] * 4
    drawn = figure_intervals([{(0, 0): half}], 1, draws=500)["overall_performance"]
    assert 0.4 < drawn[0] < 0.6 < 0.65 < drawn[1] < 0.8
    mixed = figure_intervals([{(0, 0): half, (1, 0): [1.0] * 16, (1, 1): [1.0] * 16}], 2, draws=500)
    assert mixed["overall_performance"][0] == pytest.approx(1 - math.sqrt(2) * 0.1936 / 2, abs=1e-3)
    # The same rows in two runs are not more rows.
    seeds = [{(0, 0): [1.0] * 16}, {(0, 0): [1.0] * 16}]
    assert figure_intervals(seeds, 1, draws=50)["overall_performance"] == pytest.approx(wilson(16, 16))
    loss = figure_intervals([{(0, 0): [2.0, 3.0], (1, 0): [2.5, 3.5], (1, 1): [1.0, 2.0]}], 2, 50, lower_is_better=True)
    assert loss["backward_transfer"] == (-0.5, -0.5)


@pytest.mark.parametrize(("p", "q", "n"), [(0.97, 0.97, 20), (0.5, 0.8, 40), (0.9, 0.99, 100)])
def test_intervals_hold_the_truth_as_often_as_they_say(p, q, n):
    """Of 400 drawn tests at least 89 in 100 intervals of a mean over two tasks, and of a change, hold the true value.

    With 20 rows of which 97 in 100 are right, discrete scores allow no more; elsewhere it is 95.
    """
    rng = np.random.default_rng(0)
    held = {"overall_performance": 0, "backward_transfer": 0}
    for _ in range(400):
        first, again = (rng.random(n) < p), (rng.random(n) < 0.7)
        later = np.where(again, first, rng.random(n) < q)
        second = rng.random(n) < q
        run = {(0, 0): first.astype(float), (1, 0): later.astype(float), (1, 1): second.astype(float)}
        truth = 0.7 * p + 0.3 * q
        bounds = figure_intervals([run], 2)
        for name, value in (("overall_performance", (truth + q) / 2), ("backward_transfer", truth - p)):
            held[name] += bounds[name][0] - 1e-12 <= value <= bounds[name][1] + 1e-12
    assert min(held.values()) >= (0.89 if n == 20 else 0.93) * 400, held


def test_mcnemar():
    """9 rows better, 1 worse: 2 * (1 + 10) / 2^10 = 0.0215; rows that are equal do not count."""
    first = [0.0] * 9 + [1.0] + [1.0] * 30
    second = [1.0] * 9 + [0.0] + [1.0] * 30
    found = paired_test({"a": first}, {"a": second})
    assert found.p_value == pytest.approx(2 * 11 / 1024) and (found.better, found.worse, found.n) == (9, 1, 40)
    assert found.difference == pytest.approx(0.2) and found.interval[0] > 0 and found.test == "McNemar, exact"
    assert paired_test({"a": second}, {"a": first}).interval == (
        pytest.approx(-found.interval[1]), pytest.approx(-found.interval[0]),
    )  # fmt: skip
    same = paired_test({"a": [1.0] * 16}, {"a": [1.0] * 16})
    assert same.p_value == 1.0 and same.difference == 0.0 and same.interval[1] == pytest.approx(0.1936, abs=5e-5)
    two = paired_test({"a": first, "b": [0.0] * 4}, {"a": second, "b": [1.0] * 4})
    assert two.difference == pytest.approx((0.2 + 1) / 2) and two.p_value == pytest.approx(2 * 15 / 2**14)


def test_differences_that_are_not_fractions():
    """Three rows all better: of 2^3 signs two are as far from 0, p = 0.25."""
    found = paired_test({"a": [0.1, 0.2, 0.3]}, {"a": [0.4, 0.6, 0.5]})
    assert found.p_value == pytest.approx(0.25) and found.difference == pytest.approx(0.3)
    assert found.interval[0] >= 0.2 - 1e-9 and found.interval[1] <= 0.4 + 1e-9
    assert paired_test({"a": [0.1, 0.2]}, {"a": [0.1, 0.2]}).p_value == 1.0
    assert paired_test({"a": [0.1, 0.2]}, {"a": [0.1, 0.2]}).interval is None
    with pytest.raises(ValueError, match=r"different tasks or rows \(a: 2 and a: 1\)"):
        paired_test({"a": [0.1, 0.2]}, {"a": [0.1]})
    with pytest.raises(ValueError, match="no rows to compare"):
        paired_test({}, {})


def test_parts_without_rows_to_tell_have_no_interval():
    assert combined_interval([(1.0, [0.5, 0.5])]) is None
