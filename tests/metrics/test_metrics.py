"""The accuracy matrix against figures worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_continual import AccuracyMatrix

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
    with pytest.raises(ValueError, match="2 rows, but no row has a score for task 1"):
        AccuracyMatrix([[0.5], [0.5]], None)
    with pytest.raises(ValueError, match="base has 1 scores and the matrix 2 tasks"):
        AccuracyMatrix([[0.5], [0.5, 0.5]], [0.1])


@given(
    st.integers(2, 5).flatmap(
        lambda n: st.lists(st.lists(st.floats(0, 1), min_size=n, max_size=n), min_size=n, max_size=n)
    )
)
def test_forgetting_is_at_least_the_loss_since_learning(scores):
    matrix = AccuracyMatrix(scores)
    assert matrix.forgetting >= -matrix.backward_transfer - 1e-12
    assert all(low <= scores[-1][j] for j, low in enumerate(matrix.per_task_minimum))
