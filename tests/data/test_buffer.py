"""The buffer's rows: the authors' rows, balance, uniformity, and the same rows whether filled in parts or at once."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_continual.data.buffer import ORIGIN, Memory, balanced_order, class_balanced, newest_first, reservoir
from hf_continual.tasks import Task, TaskStream

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "kif" / "memory_buffer.json").read_text())["tasks"]


def tasks(*completions, column="completion"):
    """Tasks t0, t1, ... with these completions."""
    rows = [[{"prompt": f"p{i}", column: c} for i, c in enumerate(task)] for task in completions]
    return list(TaskStream([Task(f"t{i}", train=Dataset.from_list(r)) for i, r in enumerate(rows)]))


def test_the_authors_rows():
    """The same rows, in the same order, as Recurrent-KIF's loader keeps of three tasks."""
    learned = tasks(*(task["classes"] for task in GOLDEN.values()))
    wanted = [(place, row) for place, task in enumerate(GOLDEN.values()) for row in task["kept"]]
    assert len(wanted) == 60 and Memory().chosen(learned) == wanted
    assert Memory(share=0.02).chosen(learned[:2]) == wanted[:40], "an old task's rows stay when a new one comes"
    assert Memory(rows=20).chosen(learned) == wanted
    assert Memory(seed=43).chosen(learned) != wanted


@settings(max_examples=200, deadline=None)
@given(labels=st.lists(st.integers(0, 6), max_size=60), number=st.integers(1, 40), seed=st.integers(0, 9))
def test_classes_are_kept_evenly(labels, number, seed):
    chosen = class_balanced(labels, number, random.Random(seed))
    assert len(chosen) == len(set(chosen)) == min(number, len(labels))
    there, kept = Counter(labels), Counter(labels[row] for row in chosen)
    if len(there) <= number:
        quota = len(chosen) // max(len(there), 1)
        assert all(kept[label] >= min(quota, there[label]) for label in there)
    ordered = balanced_order(chosen, labels)
    assert sorted(ordered) == sorted(chosen)
    for n in range(len(ordered)):
        counts = Counter(labels[row] for row in ordered[:n])
        # Every class that still has rows left is at most one row short of the largest.
        assert all(
            counts[label] >= max(counts.values(), default=0) - 1 for label in kept if counts[label] < kept[label]
        )


def test_free_text_has_no_classes():
    """More answers than rows to keep: a uniform sample, never more than requested."""
    answers = [f"answer {i}" for i in range(97)] + ["answer 0"] * 3
    hits = Counter(row for seed in range(400) for row in Memory(rows=10, seed=seed).chosen(tasks(answers)))
    assert sum(hits.values()) == 400 * 10
    assert sum((hits[(0, row)] - 40) ** 2 / 40 for row in range(100)) < 149, "chi-square, 99 degrees: p = 0.001"
    text = tasks(answers, column="text")
    assert len(Memory(rows=10).chosen(text)) == 10, "without completions too"
    assert len(Memory().chosen(tasks(answers[:7]))) == 1, "2 % of 7 rows is one row, not none"
    assert len(Memory(share=0.29).chosen(tasks(["x"] * 100))) == 29, "29 % in floating point is a little less"
    chat = tasks([[{"role": "assistant", "content": "yn"[i % 2]}] for i in range(20)])
    assert Counter(row % 2 for _, row in Memory(rows=6).chosen(chat)) == {0: 3, 1: 3}, "messages are classes as well"


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=6), capacity=st.integers(1, 40), seed=st.integers(0, 99)
)
def test_a_reservoir_in_parts_is_the_whole(counts, capacity, seed):
    stream = [(task, row) for task, count in enumerate(counts) for row in range(count)]
    kept, seen = [], 0
    for task, count in enumerate(counts):
        kept = reservoir(kept, [(task, row) for row in range(count)], capacity, seed, seen)
        seen += count
    assert kept == reservoir([], stream, capacity, seed, 0)
    assert len(set(kept)) == len(kept) == min(capacity, len(stream))


def test_a_reservoir_is_uniform():
    hits: Counter[int] = Counter()
    for seed in range(3000):
        hits.update(reservoir(reservoir([], range(30), 10, seed, 0), range(30, 50), 10, seed, 30))
    expected = 3000 * 10 / 50
    # The variance of a count is that of a draw without replacement, hence the factor.
    chi = sum((hits[row] - expected) ** 2 for row in range(50)) / (expected * (1 - 10 / 50))
    assert chi < 86, f"chi-square, 49 degrees: p = 0.001; got {chi:.1f}"


def test_newest_first():
    assert newest_first([4, 3, 2], 9) == [4, 3, 2]
    assert newest_first([4, 3, 2], 6) == [1, 3, 2]
    assert newest_first([4, 3, 2], 1) == [0, 0, 1]
    learned = tasks("ab" * 10, "ab" * 10, "ab" * 10)
    memory = Memory("newest_first", rows=6, capacity=10)
    one, two, three = (memory.chosen(learned[:n]) for n in (1, 2, 3))
    assert [Counter(place for place, _ in kept) for kept in (one, two, three)] == [{0: 6}, {0: 4, 1: 6}, {1: 4, 2: 6}]
    assert {pair for pair in two if pair[0] == 0} < set(one), "rows that left do not come back"
    assert {pair for pair in three if pair[0] == 1} < {pair for pair in two if pair[0] == 1}
    for kept in (one, two, three):
        for place in {place for place, _ in kept}:
            counts = Counter("ab"[row % 2] for p, row in kept if p == place)
            assert counts["a"] == counts["b"], "the oldest task is cut evenly over its classes"


@pytest.mark.parametrize("policy", ["reservoir", "newest_first", "class_balanced"])
def test_another_run_continues_with_what_was_kept(policy):
    learned = tasks("abc" * 10, "de" * 9, "f" * 12)
    options = {"reservoir": {"capacity": 8}, "newest_first": {"capacity": 8, "rows": 5}, "class_balanced": {"rows": 5}}
    memory = Memory(policy, **options[policy])
    handed_on = memory.records(learned[:2], {"t0": "a.jsonl"})
    later = Memory(policy, **options[policy], start=handed_on)
    together = later.records(learned[2:])
    assert later.seen(learned[2:]) == 60 == together[0]["memory_seen"]
    if policy == "reservoir":
        at_once = memory.records(learned)
        assert [(r["memory_task"], r["memory_row"]) for r in together] == [
            (r["memory_task"], r["memory_row"]) for r in at_once
        ]
    kept = Counter(r["memory_task"] for r in together)
    if policy != "reservoir":
        assert kept == ({"t1": 3, "t2": 5} if policy == "newest_first" else {"t0": 5, "t1": 5, "t2": 5})
    for row in together:
        task = learned[int(row["memory_task"][1])]
        assert row["completion"] == task.train[row["memory_row"]]["completion"]
        assert row["memory_source"] == ("a.jsonl" if row["memory_task"] == "t0" else None)


def test_kept_rows_are_a_dataset_with_their_origin():
    learned = tasks("ab" * 5, "cd" * 5)
    kept = Memory(rows=2).kept(learned, {"t0": "x.jsonl"})
    assert set(kept.column_names) == {"prompt", "completion", *ORIGIN} and len(kept) == 4
    assert kept["memory_task"][:] == ["t0", "t0", "t1", "t1"] and set(kept["memory_seen"]) == {20}
    for row in kept:
        assert row["prompt"] == f"p{row['memory_row']}"


def test_classes_by_another_column():
    rows = Dataset.from_list([{"text": f"t{i}", "label": i % 3} for i in range(30)])
    task = Task("t", train=rows)
    assert Counter(row % 3 for _, row in Memory(rows=9, by="label").chosen([task])) == {0: 3, 1: 3, 2: 3}
    with pytest.raises(ValueError, match=r"by: the rows of task 't' have no 'kind', only \['text', 'label'\]"):
        Memory(by="kind").chosen([task])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "reservoir"}, "reservoir a capacity"),
        ({"policy": "newest_first", "share": 0.1}, "newest_first a capacity and share or rows"),
        ({"policy": "reservoir", "capacity": 5, "rows": 3}, "reservoir a capacity"),
        ({"capacity": 5}, "class_balanced takes share or rows"),
        ({"share": 0.1, "rows": 3}, "class_balanced takes share or rows"),
        ({"share": 0.0}, "share must lie in"),
        ({"share": 1.5}, "share must lie in"),
        ({"rows": 0}, "must be at least 1"),
        ({"policy": "reservoir", "capacity": 0}, "must be at least 1"),
        ({"start": [{"prompt": "x"}]}, "has no 'memory_task': it was not written by a buffer"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Memory(**options)


def test_a_reservoir_cannot_grow():
    start = Memory("reservoir", capacity=4).records(tasks("ab" * 5))
    for capacity in (3, 5):
        with pytest.raises(ValueError, match="start holds 4 of the 10 rows that were seen, which cannot be continued"):
            Memory("reservoir", capacity=capacity, start=start)
