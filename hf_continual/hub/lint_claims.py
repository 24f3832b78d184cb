"""Numbers that a card's author states as results: each is compared with the measurements of what it refers to."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_continual.atomic_files import read_json, read_object
from hf_continual.hub.facts import CONFIG, RESULTS, Evaluation
from hf_continual.hub.folder_facts import evaluation_from
from hf_continual.hub.lint_metadata import Rule
from hf_continual.hub.text import is_generated, kept_text

_BENCHMARK = re.compile(
    r"\b(?:MMLU|GSM8?K|HellaSwag|SWAG|ARC|TruthfulQA|HumanEval|MBPP|WinoGrande|IFEval|BBH|GPQA)\b", re.IGNORECASE
)
_METRIC = re.compile(
    r"accura|\bacc\b|\bscor|exact[- ]match|\bF1\b|BLEU|ROUGE|perplex|\bppl\b|\bloss\b|forget|transfer|\b[BF]WT\b|pass@|MMLU|"
    r"GSM|Swag|\bARC\b|TruthfulQA|HumanEval|MBPP|WinoGrande|IFEval|\bBBH\b|GPQA|bench|\bnats\b|outperform|\bbetter\b",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"(?<![\w.,/@-])(\d+(?:[.,]\d+)?)(\s?(?:%|percent\b|per cent\b))?(?![\w/]|[.,]\d)")
_UNIT = re.compile(
    r"\s*(?:-?shot|tasks?|rows?|epochs?|steps?|GPUs?|layers?|examples?|samples?|languages?|seeds?|runs?|hours?|tokens?)\b"
)
_CITED = re.compile(r"\]\([^)\s]+\)|https?://")
_CLAUSE = re.compile(r"[;,](?=\s)|\band\b|\bbut\b|\bwhile\b|\.(?=\s)")


@dataclass
class Measured:
    """Measurements, by what they are about.

    Args:
        things: Values by the name of a task or general ability, in lower case.
        figures: OP, BWT, FWT, forgetting, their intervals and numbers of rows, which are about all tasks.
        settings: Values by the name of a setting.
    """

    things: dict[str, list[float]] = field(default_factory=dict)
    figures: list[float] = field(default_factory=list)
    settings: dict[str, list[float]] = field(default_factory=dict)

    def about(self, clause: str, line: str) -> list[float]:
        """Values that a number in a clause may refer to: of things that the clause or its line names, or of all."""
        settings = [v for name, values in self.settings.items() if _names(clause, name) for v in values]
        for text in (clause, line):
            named = [name for name in self.things if _names(text, name)]
            strange = [b for b in _BENCHMARK.findall(text) if not any(b.lower() in name for name in self.things)]
            if named or strange:
                found = [v for name in named for v in self.things[name]]
                return found + settings + ([] if strange else self.figures)
        return [*(v for values in self.things.values() for v in values), *self.figures, *settings]


def _names(text: str, name: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE) is not None


def check_claims(text: str, body: str, folder: Path) -> Iterator[Rule]:
    """Find numbers that the author states as results, but that nothing in the folder has measured.

    Args:
        text: The card.
        body: The card without its metadata.
        folder: The folder with its facts; without facts, nothing can be compared.

    Yields:
        Rule: ``"claim"``, and the claim.
    """
    measured = _measured(folder)
    if measured is None:
        return
    own = kept_text(text) if is_generated(text) else body
    prose = re.sub(r"^```.*?^```|<!--.*?-->", "", own, flags=re.DOTALL | re.MULTILINE)
    for line in prose.splitlines():
        # A link to the measurement lets the reader check the number.
        if _CITED.search(line):
            continue
        for found in _NUMBER.finditer(line):
            percent = found[2] is not None
            if not percent and (not _METRIC.search(line) or _UNIT.match(line, found.end()) or _is_year(found[1])):
                continue
            if not _is_one_of(found[1].replace(",", "."), percent, measured.about(_clause(line, found.start()), line)):
                yield (
                    "claim",
                    f"the author's text says {found[0].strip()!r} in {line.strip()[:100]!r}, but no measurement in "
                    f"this folder matches it. Link its source in the same line, or remove it.",
                )


def _clause(line: str, place: int) -> str:
    """The part of a line, between commas and the like, around a position."""
    cuts = [0, *(m.end() for m in _CLAUSE.finditer(line)), len(line)]
    return next(line[a:b] for a, b in itertools.pairwise(cuts) if a <= place < b or b == len(line))


def _is_year(text: str) -> bool:
    return re.fullmatch(r"(19|20)\d\d", text) is not None


def _is_one_of(text: str, percent: bool, values: list[float]) -> bool:
    """Whether a number is one of these, to the digits that are written."""
    value, places = float(text), len(text.partition(".")[2])
    scales = (100.0,) if percent else (1.0, 100.0)
    return any(abs(abs(m) * scale - value) <= 0.5 * 10**-places + 1e-9 for m in values for scale in scales)


def _measured(folder: Path) -> Measured | None:
    """All measurements and settings from the folder's files; None if it has neither."""
    if not any((folder / name).is_file() for name in (RESULTS, CONFIG)):
        return None
    found = Measured()
    try:
        evaluation = evaluation_from(read_object(folder / RESULTS))
        _of_evaluation(evaluation, found)
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        pass  # reported by `check_numbers`
    try:
        _collect(read_json(folder / CONFIG), "", found.settings)
    except (FileNotFoundError, ValueError):
        pass  # reported by `check_numbers`
    return found


def _of_evaluation(evaluation: Evaluation, found: Measured) -> None:
    for j, task in enumerate(evaluation.tasks):
        column = [row[j] for row in [evaluation.base_row or (), *evaluation.matrix] if j < len(row)]
        known = [v for v in column if v is not None]
        # A change is between two rows for one task.
        found.things[task.lower()] = [*known, *(a - b for a in known for b in known if a > b)]
    for gauge in evaluation.gauges:
        known = [v for v in (gauge.base, gauge.value) if v is not None]
        found.things[gauge.name.lower()] = [*known, *(abs(a - b) for a in known for b in known if a > b)]
    found.figures += [v for v in evaluation.figures.values() if v is not None]
    found.figures += [v for pair in evaluation.intervals.values() for v in pair]
    found.figures += [float(n) for n in evaluation.rows.values()]


def _collect(data: Any, name: str, found: dict[str, list[float]]) -> None:
    """Numbers of the configuration, by the name of their entry."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            _collect(value, str(key).replace("_", " ").lower(), found)
    elif isinstance(data, list):
        for item in data:
            _collect(item, name, found)
    elif isinstance(data, int | float) and not isinstance(data, bool) and name:
        found.setdefault(name, []).append(float(data))
