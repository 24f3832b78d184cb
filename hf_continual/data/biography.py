"""Invented people with invented lives: facts that no pretrained model can know, seeded, nothing to download.

The construction follows the Biography experiment of Zheng et al. (ICLR 2025, section 3 and appendix), with different
names and sentences: six attributes per person, several paraphrases per attribute, the six sentences in random
order with the full name in each, and one question per attribute. The company's city is determined by the company.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from datasets import Dataset

ATTRIBUTES = ("birth_date", "birth_city", "university", "major", "company", "company_city")

_FIRST = ("Ka", "Lo", "Mi", "Ne", "Ta", "Vi", "So", "Ru", "Be", "Da", "Ze", "Fa", "Jo", "Pe", "Wi", "Ul")
_SECOND = ("ren", "lia", "mon", "dra", "vin", "sel", "tho", "bri", "nak", "pol", "rix", "wen")
_LAST = ("Arde", "Bolt", "Cors", "Dunn", "Elk", "Frey", "Grov", "Hask", "Ister", "Jarn", "Keld", "Lomb")
_ENDING = ("en", "ovic", "son", "ley", "mark", "ström", "well", "ard", "ini", "ford")
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
_CITY = ("Alder", "Brook", "Cedar", "Dale", "East", "Fern", "Glen", "Haven", "Iron", "Juniper", "King", "Lake")
_PLACE = ("bury", "field", "haven", "port", "stead", "ton", "vale", "wick")
_SCHOOL = ("Ashgrove", "Birchmoor", "Crestfall", "Dunmore", "Eastlight", "Farrow", "Goldmere", "Highwater", "Ivory")
_MAJOR = (
    "Acoustics", "Botany", "Cartography", "Demography", "Ethics", "Forestry", "Geology", "Horology", "Immunology",
    "Journalism", "Kinematics", "Linguistics", "Metallurgy", "Navigation", "Optics", "Pharmacy", "Robotics",
    "Statistics", "Topology", "Urban Planning",
)  # fmt: skip
_FIRM = ("Amber", "Blue", "Copper", "Delta", "Ember", "Flint", "Granite", "Harbor", "Indigo", "Jade", "Lunar")
_TRADE = ("Analytics", "Bearings", "Cables", "Dairy", "Engines", "Foods", "Glass", "Hydraulics", "Logistics")

TEMPLATES: dict[str, tuple[str, ...]] = {
    "birth_date": (
        "{name} was born on {value}.",
        "{name} came into the world on {value}.",
        "{name} celebrates every birthday on {value}.",
        "The day on which {name} was born is {value}.",
        "{name}'s birth certificate is dated {value}.",
        "Life began for {name} on {value}.",
    ),
    "birth_city": (
        "{name} was born in {value}.",
        "{name} took the first steps of life in {value}.",
        "The birthplace of {name} is {value}.",
        "{name}'s parents were living in {value} when their child was born.",
        "{name} is a native of {value}.",
        "{name} first saw the light of day in {value}.",
    ),
    "university": (
        "{name} studied at {value}.",
        "{name} graduated from {value}.",
        "{name} received a degree from {value}.",
        "The lecture halls that {name} attended were those of {value}.",
        "{name} spent the student years at {value}.",
        "{name} is an alumnus of {value}.",
    ),
    "major": (
        "{name} majored in {value}.",
        "{name} chose {value} as the field of study.",
        "{name} wrote the final thesis in {value}.",
        "The subject that {name} studied was {value}.",
        "{name} was trained in {value}.",
        "{name} specialised in {value}.",
    ),
    "company": (
        "{name} works for {value}.",
        "{name} was hired by {value}.",
        "{name} built a career at {value}.",
        "The employer of {name} is {value}.",
        "{name} draws a salary from {value}.",
        "{name} joined the staff of {value}.",
    ),
    "company_city": (
        "{name} works in {value}.",
        "{name}'s office is in {value}.",
        "{name} commutes every day to {value}.",
        "The working days of {name} are spent in {value}.",
        "{name} took a post in {value}.",
        "{name} moved to {value} for work.",
    ),
}

QUESTIONS: dict[str, str] = {
    "birth_date": "What is the birth date of {name}?",
    "birth_city": "In which city was {name} born?",
    "university": "Which university did {name} attend?",
    "major": "What did {name} study?",
    "company": "Which company employs {name}?",
    "company_city": "In which city does {name} work?",
}


@dataclass(frozen=True)
class Person:
    """An invented person.

    Args:
        name: Full name, unique among the people of one call.
        facts: Value by attribute, see `ATTRIBUTES`.
    """

    name: str
    facts: dict[str, str]


def people(number: int, seed: int = 0) -> list[Person]:
    """Invent people with unique names and independent attributes.

    Args:
        number: Number of people; at most 23,040, the number of names.
        seed: Seed of names and attributes. A longer list begins with the shorter list's people.

    Returns:
        The people.

    Raises:
        ValueError: If there are not enough names.
    """
    names = [f"{a}{b} {c}{d}" for a in _FIRST for b in _SECOND for c in _LAST for d in _ENDING]
    if not 0 < number <= len(names):
        raise ValueError(f"people(number={number}): there are {len(names)} names, so between 1 and that many people.")
    rng = np.random.default_rng([seed, 17])
    order = rng.permutation(len(names))
    made = []
    for i in range(number):
        own = np.random.default_rng([seed, i, 23])

        def pick(*pools: Sequence[str], rng: np.random.Generator = own) -> list[str]:
            return [pool[int(rng.integers(len(pool)))] for pool in pools]

        firm, trade = pick(_FIRM, _TRADE)
        seat = np.random.default_rng([seed, _FIRM.index(firm), _TRADE.index(trade), 29])
        facts = {
            "birth_date": f"{pick(_MONTHS)[0]} {int(own.integers(1, 29))}, {int(own.integers(1900, 2000))}",
            "birth_city": "".join(pick(_CITY, _PLACE)),
            "university": f"{pick(_SCHOOL)[0]} {pick(('College', 'Institute', 'University'))[0]}",
            "major": pick(_MAJOR)[0],
            "company": f"{firm} {trade}",
            "company_city": "".join(pick(_CITY, _PLACE, rng=seat)),
        }
        made.append(Person(names[int(order[i])], facts))
    return made


def biographies(who: Sequence[Person], versions: int = 5, seed: int = 0) -> Dataset:
    """Texts about people: each version states all six facts in different words and a different order.

    Args:
        who: The people.
        versions: Texts per person, each with different paraphrases; at most 6.
        seed: Seed of the wording and the order.

    Returns:
        Rows ``{"text", "name"}``.

    Raises:
        ValueError: If there are not that many paraphrases.
    """
    most = min(map(len, TEMPLATES.values()))
    if not 0 < versions <= most:
        raise ValueError(f"biographies(versions={versions}): there are {most} paraphrases of each sentence.")
    rows = []
    for i, person in enumerate(who):
        rng = np.random.default_rng([seed, i, 31])
        words = {a: rng.permutation(len(TEMPLATES[a]))[:versions] for a in ATTRIBUTES}
        for version in range(versions):
            sentences = [
                TEMPLATES[a][words[a][version]].format(name=person.name, value=person.facts[a])
                for a in rng.permutation(ATTRIBUTES)
            ]
            rows.append({"text": " ".join(sentences), "name": person.name})
    return Dataset.from_list(rows)


def questions(who: Sequence[Person], attributes: Sequence[str] = ATTRIBUTES) -> Dataset:
    """One question and answer per person and attribute.

    Args:
        who: The people.
        attributes: Attributes to ask about.

    Returns:
        Rows ``{"prompt", "completion"}``; the completion begins with a space.

    Raises:
        ValueError: If an attribute is unknown.
    """
    if unknown := sorted(set(attributes) - set(ATTRIBUTES)):
        raise ValueError(f"questions: unknown attribute {unknown[0]!r}; there are {', '.join(ATTRIBUTES)}.")
    return Dataset.from_list(
        [
            {"prompt": QUESTIONS[a].format(name=person.name) + "\nAnswer:", "completion": f" {person.facts[a]}"}
            for person in who
            for a in attributes
        ]
    )


def biography_rows(
    people_number: int,
    kind: Literal["texts", "questions"] = "questions",
    skip: int = 0,
    attributes: Sequence[str] = ATTRIBUTES,
    versions: int = 5,
    seed: int = 0,
) -> Dataset:
    """Rows of a task about invented people, as written in a plan: ``{biography: {people_number: 60, skip: 120}}``.

    Args:
        people_number: Number of people.
        kind: Their biographies (``{"text", "name"}``), or questions about them (``{"prompt", "completion"}``).
        skip: People of the same seed to skip first, so that tasks are about different people.
        attributes: Attributes to ask about.
        versions: Biographies per person.
        seed: Seed of names, facts, wording and order.

    Returns:
        The rows.

    Raises:
        ValueError: If an argument is out of range.
    """
    who = people(skip + people_number, seed)[skip:]
    if kind not in ("texts", "questions"):
        raise ValueError(f"biography: kind={kind!r} must be 'texts' or 'questions'.")
    return biographies(who, versions, seed) if kind == "texts" else questions(who, attributes)
