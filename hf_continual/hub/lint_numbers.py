"""The numbers of a card against what was measured: generated sections, results, scores, and what the author claims."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_continual.durable import read_json, read_object
from hf_continual.hub.card import render_card
from hf_continual.hub.facts import CONFIG, RESULTS, Evaluation
from hf_continual.hub.folder_facts import evaluation_from, read_facts
from hf_continual.hub.lint_metadata import Rule
from hf_continual.hub.tables import number
from hf_continual.hub.text import KEEP, KEEP_END, is_generated, kept_text, read_card

_SHOWN = 5
_SCORES = Path("continual") / "scores.json"
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


def check_numbers(metadata: Mapping[str, Any], text: str, body: str, folder: Path) -> Iterator[Rule]:
    """What a generated card says against the facts beside it.

    Args:
        metadata: The card's metadata.
        text: The card.
        body: The card without its metadata.
        folder: The folder with its facts.

    Yields:
        Rule: ``"numbers"``, and what does not agree.
    """
    if not is_generated(text):
        return
    if missing := [name for name in (CONFIG, RESULTS) if not (folder / name).is_file()]:
        yield (
            "numbers",
            f"the card was made from {missing[0]}, which is not in the folder: nothing in it can be checked.",
        )
        return
    try:
        data = read_object(folder / RESULTS)
        evaluation = evaluation_from(data)
        rendered = render_card(read_facts(folder), text)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        yield "numbers", f"{RESULTS} or {CONFIG} cannot be read: {type(error).__name__}: {error}."
        return
    found = [*_figures(data, evaluation), *_cells(body, evaluation), *_index(metadata, evaluation)]
    found += _last_scores(evaluation, folder)
    for message in found or _lines(body, read_card(rendered)[1], folder):
        yield "numbers", message


def _figures(data: Mapping[str, Any], evaluation: Evaluation) -> Iterator[str]:
    for name, value in evaluation.figures.items():
        if not _same(data.get(name), value):
            yield f"{RESULTS} says {name}={data.get(name)!r}, its matrix gives {value!r}."


def _cells(body: str, evaluation: Evaluation) -> Iterator[str]:
    shown = [*(v for row in evaluation.matrix for v in row), *(evaluation.base_row or ()), *evaluation.figures.values()]
    for value in dict.fromkeys(v for v in shown if v is not None):
        if number(value) not in body:
            yield f"{RESULTS} holds {number(value)}, which the card does not show. Render it again."


def _index(metadata: Mapping[str, Any], evaluation: Evaluation) -> Iterator[str]:
    last = dict(zip(evaluation.tasks, evaluation.matrix[-1], strict=False)) if evaluation.matrix else {}
    known: dict[str, float | None] = {**evaluation.figures, **{f"task {t}": v for t, v in last.items()}}
    for result in _results(metadata):
        for metric in result["metrics"]:
            whole = result["dataset"].get("type") == "task-sequence"
            key = metric["type"] if whole else f"task {result['dataset'].get('name')}"
            if key in known and not _same(metric["value"], known[key]):
                yield f"model-index says {key}={metric['value']!r}, {RESULTS} {known[key]!r}."


def _last_scores(evaluation: Evaluation, folder: Path) -> Iterator[str]:
    """The last row of the matrix against the scores that the run wrote when it measured them."""
    if not (folder / _SCORES).is_file() or not evaluation.matrix or evaluation.row_names is not None:
        return
    scores = read_json(folder / _SCORES)
    for task, value in zip(evaluation.tasks, evaluation.matrix[-1], strict=False):
        cell = scores.get(task) if isinstance(scores, dict) else None
        if isinstance(cell, dict) and not _same(cell.get("value"), value):
            yield f"{RESULTS} says {value!r} for {task!r}, and {_SCORES.as_posix()} {cell.get('value')!r}."


def _results(metadata: Mapping[str, Any]) -> list[Any]:
    try:
        return [
            r for entry in metadata.get("model-index", []) for r in entry["results"] if r["metrics"] and r["dataset"]
        ]
    except (KeyError, TypeError):
        return []


def _same(a: Any, b: float | None) -> bool:
    if a is None or b is None:
        return a is b
    return isinstance(a, int | float) and math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-12)


def _lines(body: str, rendered: str, folder: Path) -> Iterator[str]:
    """The generated sections, line by line, against what the facts give now."""
    here, there = _without_author(body), _without_author(rendered)
    matcher, told = difflib.SequenceMatcher(None, here, there, autojunk=False), 0
    for kind, a, b, c, d in matcher.get_opcodes():
        for i in range(a, b) if kind != "equal" else ():
            told += 1
            if told > _SHOWN:
                continue
            instead = f"the facts give {there[c + i - a]!r}" if c + i - a < d else "it comes from no fact"
            yield (
                f"the line {here[i]!r} was not written by this library: {instead}. Render the card again (hf-continual card "
                f"render {folder}), and write your own text between the keep marks."
            )
        if kind == "insert":
            yield f"the line {there[c]!r}, which the facts give, is missing. Render the card again (hf-continual card render {folder})."
    if told > _SHOWN:
        yield f"{told - _SHOWN} more lines were not written by this library."


def _without_author(body: str) -> list[str]:
    """Lines of the generated sections."""
    own = re.sub(rf"{re.escape(KEEP)}.*?(?:{re.escape(KEEP_END)}|\Z)", "", body, flags=re.DOTALL)
    return [line.rstrip() for line in own.splitlines() if line.strip()]


def check_claims(text: str, body: str, folder: Path) -> Iterator[Rule]:
    """Numbers that the author states as results, and that nothing in the folder has measured.

    Args:
        text: The card.
        body: The card without its metadata.
        folder: The folder with its facts. Without any, nothing can be compared.

    Yields:
        Rule: ``"claim"``, and what is claimed.
    """
    measured = _measured(folder)
    if measured is None:
        return
    own = kept_text(text) if is_generated(text) else body
    prose = re.sub(r"^```.*?^```|<!--.*?-->", "", own, flags=re.DOTALL | re.MULTILINE)
    for line in prose.splitlines():
        # Who says where a number was measured lets the reader check it.
        if _CITED.search(line):
            continue
        for found in _NUMBER.finditer(line):
            percent = found[2] is not None
            if not percent and (not _METRIC.search(line) or _UNIT.match(line, found.end()) or _is_year(found[1])):
                continue
            if not _is_measured(found[1].replace(",", "."), percent, measured):
                yield (
                    "claim",
                    f"the author's text says {found[0].strip()!r} in {line.strip()[:100]!r}, and nothing that was measured in "
                    f"this folder gives it. Link where it was measured in the same line, or take it out.",
                )


def _is_year(text: str) -> bool:
    return re.fullmatch(r"(19|20)\d\d", text) is not None


def _is_measured(text: str, percent: bool, measured: list[float]) -> bool:
    """Whether a number is one of the measured ones, as far as it is written out."""
    value, places = float(text), len(text.partition(".")[2])
    scales = (100.0,) if percent else (1.0, 100.0)
    return any(abs(abs(m) * scale - value) <= 0.5 * 10**-places + 1e-9 for m in measured for scale in scales)


def _measured(folder: Path) -> list[float] | None:
    """All numbers of the facts; None where there are no facts."""
    files = [folder / name for name in (RESULTS, CONFIG) if (folder / name).is_file()]
    found: list[float] = []
    for file in files:
        try:
            _collect(read_json(file), found)
        except ValueError:
            continue  # said by `check_numbers`
    return found if files else None


def _collect(data: Any, found: list[float]) -> None:
    if isinstance(data, Mapping):
        data = list(data.values())
    if isinstance(data, list):
        for item in data:
            _collect(item, found)
    elif isinstance(data, int | float) and not isinstance(data, bool):
        found.append(float(data))
