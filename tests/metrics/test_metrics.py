"""The accuracy matrix against figures computed by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_continual import AccuracyMatrix
from hf_continual.metrics import bootstrap_intervals, harmonic_mean

SCORES = [[0.9, 0.1, 0.2], [0.5, 0.8, 0.3], [0.6, 0.4, 0.7]]
BASE = [0.1, 0.05, 0.15]


def test_by_hand():
    matrix = AccuracyMatrix(SCORES, BASE)
    assert matrix.overall_performance == pytest.approx((0.6 + 0.4 + 0.7) / 3)
    assert matrix.backward_transfer == pytest.approx(((0.6 - 0.9) + (0.4 - 0.8)) / 2)
    assert matrix.forward_transfer == pytest.approx(((0.1 - 0.05) + (0.3 - 0.15)) / 2)
    assert matrix.forgetting == pytest.approx(((0.9 - 0.6) + (0.8 - 0.4)) / 2)
    assert matrix.per_task_minimum == [0.5, 0.4, 0.7]
    assert matrix.summary["forgetting"] == matrix.forgetting


def test_what_was_not_measured_is_none():
    matrix = AccuracyMatrix([[0.9, None, None], [0.5, 0.8, None], [None, 0.4, 0.7]], None)
    assert matrix.overall_performance is None and matrix.backward_transfer is None
    assert matrix.forward_transfer is None and matrix.per_task_minimum == [None, 0.4, 0.7]
    triangle = AccuracyMatrix([[0.9], [0.5, 0.8]], None)
    assert triangle.backward_transfer == pytest.approx(-0.4) and triangle.forward_transfer is None
    one = AccuracyMatrix([[0.5]], [0.1])
    assert one.backward_transfer is None and one.forgetting is None and one.overall_performance == 0.5


def test_shapes_are_checked():
    with pytest.raises(
        ValueError, match=r"scores\[1\] has 1 scores; the row after task 1 needs one for each of the 2 tasks"
    ):
        AccuracyMatrix([[0.5], [0.5]], None)
    with pytest.raises(ValueError, match="base has 1 scores and the matrix has 2 tasks"):
        AccuracyMatrix([[0.5], [0.5, 0.5]], [0.1])
    with pytest.raises(ValueError, match=r"scores\[0\] has 0 scores"):
        AccuracyMatrix([[]])


@pytest.mark.parametrize(
    ("scores", "base", "error", "words"),
    [
        ([[0.5, float("nan")], [0.5, 0.5]], None, ValueError, r"scores\[0\]\[1\] is nan.*Give None"),
        ([[0.5, 0.1], [float("inf"), 0.5]], None, ValueError, r"scores\[1\]\[0\] is inf"),
        ([[0.5, 0.1], ["high", 0.5]], None, TypeError, r"scores\[1\]\[0\] is 'high' \(str\)"),
        ([[True]], None, TypeError, r"scores\[0\]\[0\] is True"),
        ([[0.5]], [float("nan")], ValueError, r"base\[0\] is nan"),
    ],
)
def test_cells_that_no_mean_is_made_of(scores, base, error, words):
    from hf_continual.plots import plot_matrix, plot_stages

    for made in (
        AccuracyMatrix,
        lambda s, b: plot_matrix(s, ["a", "b"], b),
        lambda s, b: plot_stages(s, ["a", "b"], b),
    ):
        with pytest.raises(error, match=words):
            made(scores, base)


def test_a_picture_needs_a_name_for_each_task():
    from hf_continual.plots import plot_matrix

    with pytest.raises(ValueError, match="scores for 2 tasks and 1 names: a"):
        plot_matrix([[0.5, 0.1]], ["a"])


@given(
    st.integers(2, 5).flatmap(
        lambda n: st.lists(st.lists(st.floats(0, 1), min_size=n, max_size=n), min_size=n, max_size=n)
    )
)
def test_forgetting_is_at_least_the_loss_since_learning(scores):
    matrix = AccuracyMatrix(scores)
    assert matrix.forgetting >= -matrix.backward_transfer - 1e-12
    assert all(low <= scores[-1][j] for j, low in enumerate(matrix.per_task_minimum))


def test_the_variants_by_hand():
    matrix = AccuracyMatrix(SCORES, BASE)
    assert matrix.backward_transfer_over_all == pytest.approx(((0.6 - 0.9) + (0.4 - 0.8)) / 3)
    assert matrix.learning_accuracy == pytest.approx((0.9 + 0.8 + 0.7) / 3)
    assert matrix.average_performance == pytest.approx((0.9 + (0.5 + 0.8) / 2 + (0.6 + 0.4 + 0.7) / 3) / 3)
    # A task's best score may be before it was learned, if that was measured.
    early = AccuracyMatrix([[0.9, 0.95], [0.5, 0.8], [0.5, 0.7, 0.6]])
    assert early.forgetting == pytest.approx(((0.9 - 0.5) + (0.95 - 0.7)) / 2)


def test_losses_turn_the_signs():
    accuracy = AccuracyMatrix(SCORES, BASE)
    losses = AccuracyMatrix([[-v for v in row] for row in SCORES], [-v for v in BASE], lower_is_better=True)
    for name in ("backward_transfer", "forward_transfer", "forgetting", "backward_transfer_over_all"):
        assert getattr(losses, name) == pytest.approx(getattr(accuracy, name))
    assert losses.per_task_minimum == [-v for v in accuracy.per_task_minimum]


def test_harmonic_mean_is_geres_table():
    assert harmonic_mean(60.7155, 74.0817) == pytest.approx(66.7359, abs=1e-4)
    assert harmonic_mean(66.2539, 64.4417) == pytest.approx(65.3352, abs=1e-4)
    assert harmonic_mean(0.0, 0.0) == 0.0 and harmonic_mean(None, 1.0) is None


def test_bootstrap_over_rows():
    rng = __import__("random").Random(0)
    rows = {(0, 0): [1.0] * 100, (1, 0): [float(rng.random() < 0.5) for _ in range(100)], (1, 1): [1.0] * 50}
    bounds = bootstrap_intervals([rows], 2, draws=2000)
    share = sum(rows[1, 0]) / 100
    error = 1.96 * (share * (1 - share) / 100) ** 0.5
    low, high = bounds["backward_transfer"]
    assert low == pytest.approx(share - error - 1, abs=0.02) and high == pytest.approx(share + error - 1, abs=0.02)
    assert bounds["learning_accuracy"] == (1.0, 1.0) and bounds["forward_transfer"] is None
    assert bootstrap_intervals([rows], 2, draws=50) == bootstrap_intervals([rows], 2, draws=50)


def test_bootstrap_draws_the_same_rows_at_every_moment():
    """A model that does not change has no transfer in any draw, however its rows are drawn."""
    rows = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    bounds = bootstrap_intervals([{(0, 0): rows, (1, 0): rows, (1, 1): rows}], 2)
    assert bounds["backward_transfer"] == (0.0, 0.0) and bounds["overall_performance"][0] < 0.5


def test_bootstrap_over_seeds():
    runs = [{(0, 0): [v] * 10, (1, 0): [v] * 10, (1, 1): [v] * 10} for v in (0.2, 0.8)]
    assert bootstrap_intervals(runs, 2)["overall_performance"] == (pytest.approx(0.2), pytest.approx(0.8))
