"""Hashes of a task's rows, and counts of the samples that a model wrote of them: kept, malformed, invented."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset

from hf_continual.data.sample_format import (
    IGNORED,
    Flaw,
    SampleFormat,
    Tokens,
    documents,
    places_of,
    question_and_answer,
)

Known = tuple[np.ndarray, np.ndarray]  # digests of questions, and of questions with their answers; sorted int64


def digest(tokens: Tokens) -> int:
    """8 bytes that tell token sequences apart without keeping them, as a signed number."""
    data = np.asarray(tokens, dtype=np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


@dataclass
class Survey:
    """What is known of a task's rows before they are trained.

    Attributes:
        rows: Their number; a packed row counts as those within.
        longest: Most tokens of one in the format of samples.
        left_out: How many are too long for that format.
        questions: Whether some have a question.
        plain: Whether some have none.
        known: Digests of the questions, and of the questions with their answers.
    """

    rows: int = 0
    longest: int = 0
    left_out: int = 0
    questions: bool = False
    plain: bool = False
    known: Known = field(default_factory=lambda: (np.zeros(0, np.int64), np.zeros(0, np.int64)))


def survey(rows: Dataset, how: SampleFormat, who: str, remember: bool = True) -> Survey:
    """Look through a task's rows once.

    Args:
        rows: Tokenised rows.
        how: The format of samples.
        who: The method, for messages.
        remember: Whether digests are wanted.

    Returns:
        What was found.

    Raises:
        ValueError: If a row holds a marker or has several trained parts, or none fits into the format.
    """
    found, asked, both = Survey(), array("q"), array("q")
    for number, (tokens, labels) in enumerate(documents(rows)):
        for marker in (how.generate, how.answer):
            if places_of(marker, tokens):
                raise ValueError(
                    f"{who}: row {number} holds the tokens {list(marker)} of a marker, so what the model writes could not be "
                    f"taken apart. Give markers that no row holds: gen_marker=..., answer_marker=...."
                )
        try:
            parts = question_and_answer(tokens.tolist(), labels.tolist())
        except ValueError as error:
            raise ValueError(
                f"{who}: {error} (row {number}), and a sample has one question and one answer. Split conversations into one "
                f"row for each answer, with prompt and completion."
            ) from error
        found.rows += 1
        if parts is None:
            continue
        question, answer = parts
        length = len(how.generate) + (len(how.answer) if question else 0) + len(question) + len(answer)
        if how.most is not None and length > how.most:
            found.left_out += 1
            continue
        found.longest = max(found.longest, length)
        found.questions, found.plain = found.questions or bool(question), found.plain or not question
        if remember:
            asked.append(digest(question or answer))
            both.append(digest([*question, IGNORED, *answer]))
    if not found.longest:
        raise ValueError(
            f"{who}: none of the {found.rows} rows has room for the markers within {how.most} tokens, so no sample could be "
            f"learned. Raise max_length, or give shorter rows or markers."
        )
    found.known = np.unique(np.asarray(asked, np.int64)), np.unique(np.asarray(both, np.int64))
    return found


def merged(one: Known, other: Known) -> Known:
    """What either knows."""
    return np.union1d(one[0], other[0]), np.union1d(one[1], other[1])


@dataclass
class Counts:
    """Counts of the samples that a model wrote.

    Attributes:
        written: How many it wrote.
        kept: How many are used.
        malformed: How many are not of the format: no end, not exactly one answer, an empty part.
        duplicated: How many of the kept ones are equal to an earlier one.
        invented: How many of the kept ones ask what no earlier row asked; None where that is not known.
        misanswered: How many ask what an earlier row asked and answer otherwise; None where that is not known.
        flaws: Number of malformed samples by what is wrong with them.
    """

    written: int = 0
    kept: int = 0
    malformed: int = 0
    duplicated: int = 0
    invented: int | None = None
    misanswered: int | None = None
    flaws: dict[str, int] = field(default_factory=dict)


def count(
    written: Sequence[dict[str, list[int]] | Flaw], known: Known | None
) -> tuple[list[dict[str, list[int]]], Counts]:
    """Keep what has the format, and count what does not, what is there twice and what is new.

    Args:
        written: What `SampleFormat.read` made of each sample.
        known: Digests of the earlier tasks' questions, and of their questions with answers; None if they were not kept.

    Returns:
        The samples that are kept, duplicates among them, and the counts.
    """
    counts = Counts(written=len(written))
    kept, seen = [], set()
    if known is not None:
        counts.invented = counts.misanswered = 0
    for sample in written:
        if isinstance(sample, str):
            counts.malformed += 1
            counts.flaws[sample] = counts.flaws.get(sample, 0) + 1
            continue
        kept.append(sample)
        question, answer = question_and_answer(sample["input_ids"], sample["labels"]) or ([], [])
        both = digest([*question, IGNORED, *answer])
        counts.duplicated += both in seen
        seen.add(both)
        if known is not None:
            asked, answered = _holds(known[0], digest(question or answer)), _holds(known[1], both)
            counts.invented = (counts.invented or 0) + (not asked)
            counts.misanswered = (counts.misanswered or 0) + (asked and not answered)
    counts.kept = len(kept)
    return kept, counts


def _holds(sorted_digests: np.ndarray, one: int) -> bool:
    place = int(np.searchsorted(sorted_digests, one))
    return place < len(sorted_digests) and int(sorted_digests[place]) == one
