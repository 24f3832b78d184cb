"""The arithmetic of replay: ratios, slots, coverage and resume, without tensors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_continual.data.replay import ReplayDraw, owed_per_token


def draw(lengths, ratio=None, per_batch=None, slots=1, seed=0, source=0):
    owed = None if ratio is None else owed_per_token([ratio])[0]
    return ReplayDraw(lengths, seed, source, owed, per_batch, slots)


@settings(max_examples=60, deadline=None)
@given(
    ratio=st.floats(0.01, 0.9),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    tokens=st.lists(st.integers(0, 200), min_size=1, max_size=60),
    slots=st.integers(1, 4),
)
def test_no_slot_is_ever_off_by_more_than_one_row(ratio, lengths, tokens, slots):
    drawing = draw(lengths, ratio=ratio, slots=slots)
    for i, count in enumerate(tokens):
        drawing.draw(i % slots, count)
        task, replayed, _ = drawing.counters[i % slots]
        assert abs(replayed - ratio / (1 - ratio) * task) <= max(lengths) + 1e-6


def test_the_share_of_the_final_mix_is_the_ratio():
    rng = np.random.default_rng(0)
    drawing = draw(rng.integers(5, 40, 50).tolist(), ratio=0.2, slots=4)
    for i in range(2000):
        drawing.draw(i % 4, int(rng.integers(50, 150)))
    task, replayed, _ = drawing.counters.sum(axis=0)
    assert replayed / (replayed + task) == pytest.approx(0.2, abs=2e-4)


def test_two_sources_share_the_mix():
    first, second = owed_per_token([0.1, 0.3])
    assert first == pytest.approx(0.1 / 0.6) and second == pytest.approx(0.3 / 0.6)
    assert owed_per_token([None, 0.5]) == [None, 1.0]
    with pytest.raises(ValueError, match=r"\[0\.5, 0\.5\] add up to 1"):
        owed_per_token([0.5, 0.5])


def test_rows_next_to_a_fixed_source_count_as_given():
    drawing = draw([10], ratio=0.5)
    assert len(drawing.draw(0, 20, fixed_tokens=20)) in (3, 4)


def test_every_row_is_seen_once_in_each_pass():
    drawing = draw([3] * 12, per_batch=2, slots=3)
    seen = [row for _ in range(2) for slot in range(3) for row in drawing.draw(slot, 10)]
    assert sorted(seen) == list(range(12))
    again = [row for _ in range(2) for slot in range(3) for row in drawing.draw(slot, 10)]
    assert sorted(again) == list(range(12)) and again != seen


def test_two_ranks_draw_what_two_accumulation_steps_draw():
    """A slot is micro_index * world_size + rank: each rank of two owns every other slot."""
    rows = list(range(3, 30))
    one, ranks = draw(rows, ratio=0.3, slots=2), [draw(rows, ratio=0.3, slots=2) for _ in range(2)]
    for step in range(30):
        tokens = [37 + step, 51 - step]
        together = [one.draw(slot, tokens[slot]) for slot in range(2)]
        assert together == [ranks[r].draw(r, tokens[r]) for r in range(2)]


def test_counters_are_all_a_resumed_run_needs():
    straight, first = draw([7, 9, 30], ratio=0.3), draw([7, 9, 30], ratio=0.3)
    for _ in range(5):
        assert straight.draw(0, 25) == first.draw(0, 25)
    second = draw([7, 9, 30], ratio=0.3)
    second.resume(first.counters)
    assert [straight.draw(0, 25) for _ in range(9)] == [second.draw(0, 25) for _ in range(9)]


def test_counters_of_another_number_of_slots_keep_their_totals():
    drawing = draw([5], ratio=0.5, slots=3)
    drawing.resume(np.array([[101, 50, 10], [99, 49, 9]]))
    assert drawing.counters.shape == (3, 3)
    assert drawing.counters.sum(axis=0).tolist() == [200, 99, 19]


def test_seed_and_source_change_the_order():
    orders = {
        tuple(draw([1] * 20, per_batch=20, seed=seed, source=source).draw(0, 1)) for seed in (0, 1) for source in (0, 1)
    }
    assert len(orders) == 4


def test_global_random_state_is_not_touched():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    draw([4, 5], ratio=0.4).draw(0, 100)
    assert (np.random.get_state()[1] == before).all()
