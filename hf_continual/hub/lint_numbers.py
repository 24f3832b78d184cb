"""A card's numbers against the measurements: generated sections, metadata and results, computed again."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_continual.atomic_files import read_object
from hf_continual.hub.card import render_card
from hf_continual.hub.facts import CONFIG, RESULTS, Evaluation
from hf_continual.hub.folder_facts import evaluation_from, read_facts
from hf_continual.hub.lint_evidence import check_evidence, same
from hf_continual.hub.lint_metadata import Rule
from hf_continual.hub.tables import number
from hf_continual.hub.text import KEEP, KEEP_END, is_generated, read_card

_SHOWN = 5


def check_numbers(metadata: Mapping[str, Any], text: str, body: str, folder: Path) -> Iterator[Rule]:
    """Compare a generated card with the facts next to it.

    Args:
        metadata: The card's metadata.
        text: The card.
        body: The card without its metadata.
        folder: The folder with its facts.

    Yields:
        Rule: ``"numbers"``, and the disagreement.
    """
    if not is_generated(text):
        return
    if missing := [name for name in (CONFIG, RESULTS) if not (folder / name).is_file()]:
        yield (
            "numbers",
            f"the card was made from {missing[0]}, which is not in the folder: so nothing in it can be checked.",
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
    found += check_evidence(evaluation, folder)
    head, generated = read_card(rendered)
    for message in found or [*_head(metadata, head, folder), *_lines(body, generated, folder)]:
        yield "numbers", message


def _figures(data: Mapping[str, Any], evaluation: Evaluation) -> Iterator[str]:
    for name, value in evaluation.figures.items():
        if not same(data.get(name), value):
            yield f"{RESULTS} says {name}={data.get(name)!r}, but its matrix gives {value!r}."


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
            if key in known and not same(metric["value"], known[key]):
                yield f"model-index says {key}={metric['value']!r}, but {RESULTS} says {known[key]!r}."


def _head(metadata: Mapping[str, Any], rendered: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """Check what readers of the Hub's results see besides the values: names, datasets, how they were measured."""
    if metadata.get("model-index") != rendered.get("model-index"):
        yield (
            f"the model-index does not match the facts. Render the card again (hf-continual card render {folder}); results that you "
            f"measured elsewhere belongs between the keep marks, with a link."
        )


def _results(metadata: Mapping[str, Any]) -> list[Any]:
    try:
        return [
            r for entry in metadata.get("model-index", []) for r in entry["results"] if r["metrics"] and r["dataset"]
        ]
    except (KeyError, TypeError):
        return []


def _lines(body: str, rendered: str, folder: Path) -> Iterator[str]:
    """Compare the generated sections, line by line, with what the facts give now."""
    here, there = _without_author(body), _without_author(rendered)
    matcher, told = difflib.SequenceMatcher(None, here, there, autojunk=False), 0
    for kind, a, b, c, d in matcher.get_opcodes():
        for i in range(a, b) if kind != "equal" else ():
            told += 1
            if told > _SHOWN:
                continue
            instead = f"the facts give {there[c + i - a]!r}" if c + i - a < d else "no fact supports it"
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
