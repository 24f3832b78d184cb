"""Invented people: seeded, unique, complete."""

from __future__ import annotations

import pytest

from hf_continual.data.biography import ATTRIBUTES, biographies, people, questions


def test_people_are_seeded_and_unique():
    some = people(200, seed=3)
    assert some == people(200, seed=3) and some[:50] == people(50, seed=3) and some != people(200, seed=4)
    assert len({p.name for p in some}) == 200
    assert all(set(p.facts) == set(ATTRIBUTES) for p in some)
    cities = {}
    for p in some:
        assert cities.setdefault(p.facts["company"], p.facts["company_city"]) == p.facts["company_city"]
    with pytest.raises(ValueError, match="there are 23040 names"):
        people(30000)


def test_biographies_say_every_fact_in_other_words():
    some = people(3)
    rows = biographies(some, versions=5)
    assert len(rows) == 15 and len(set(rows["text"])) == 15
    for i, row in enumerate(rows):
        person = some[i // 5]
        assert row["text"].count(person.name) == 6
        assert all(value in row["text"] for value in person.facts.values())
    assert biographies(some, 2, seed=1)["text"][:] != biographies(some, 2, seed=2)["text"][:]
    with pytest.raises(ValueError, match="there are 6 paraphrases"):
        biographies(some, versions=7)


def test_questions():
    some = people(2)
    rows = questions(some, ["major", "company"])
    assert len(rows) == 4 and rows[0]["completion"] == f" {some[0].facts['major']}"
    assert rows[0]["prompt"].endswith("\nAnswer:") and some[0].name in rows[0]["prompt"]
    with pytest.raises(ValueError, match="unknown attribute 'height'"):
        questions(some, ["height"])
