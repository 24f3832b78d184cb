"""An offline linter for model cards: what the Hub would refuse, and what a reader should never meet."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_continual.hub.lint_metadata import check_metadata
from hf_continual.hub.tables import number
from hf_continual.hub.text import PATH, PLACEHOLDER, TOKEN, is_generated, read_card

_IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)[^)]*\)|<img[^>]+src=[\"']([^\"']+)[\"']")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"^```(?:python|py)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_RESULTS, _CONFIG = "continual_results.json", "continual_config.json"


@dataclass(frozen=True)
class Finding:
    """Something wrong with a card.

    Args:
        rule: Name of the rule.
        message: What was met, why it cannot stay, what to do.
    """

    rule: str
    message: str

    def __str__(self) -> str:
        return f"[{self.rule}] {self.message}"


def lint_card(text: str, folder: Path | None = None) -> list[Finding]:
    """Check a card without any network.

    Args:
        text: The card.
        folder: The model's folder, for pictures, links and the numbers in ``continual_results.json``.

    Returns:
        What is wrong with it; nothing for a clean card.
    """
    try:
        metadata, body = read_card(text)
    except ValueError as error:
        return [Finding("metadata", f"{error}. The Hub refuses the whole push.")]
    found = [] if metadata else [Finding("metadata", "the card has no metadata. Begin it with a '---' block.")]
    found += [Finding(rule, message) for rule, message in check_metadata(metadata)]
    for check in (_tokens, _paths, _placeholders, _snippets):
        found += check(text, body)
    if folder is not None:
        found += _files(body, folder)
        found += _numbers(metadata, text, body, folder)
    return found


def lint_folder(folder: Path) -> list[Finding]:
    """Check the card of a folder, and that it agrees with the files beside it."""
    file = folder / "README.md"
    if not file.is_file():
        return [Finding("card", f"{folder} holds no README.md. Write one, or render it: render_card({str(folder)!r}).")]
    found = lint_card(file.read_text(encoding="utf-8", errors="replace"), folder)
    for name in (_CONFIG, _RESULTS, "adapter_config.json"):
        if (folder / name).is_file():
            found += [
                Finding(f.rule, f"{name}: {f.message}")
                for f in _tokens((folder / name).read_text(encoding="utf-8"), "")
            ]
    return found


def _tokens(text: str, body: str) -> Iterator[Finding]:
    for match in TOKEN.finditer(text):
        yield Finding(
            "token", f"something that looks like an access token ({match[0][:3]}...). Revoke it and take it out."
        )


def _paths(text: str, body: str) -> Iterator[Finding]:
    for match in dict.fromkeys(m[0] for m in PATH.finditer(text)):
        yield Finding(
            "path", f"{match!r} is a path of one machine and means nothing to a reader. Name the model or file."
        )


def _placeholders(text: str, body: str) -> Iterator[Finding]:
    prose = re.sub(r"^```.*?^```", "", body, flags=re.DOTALL | re.MULTILINE)
    for match in dict.fromkeys(m[0].strip() for m in PLACEHOLDER.finditer(prose)):
        yield Finding("placeholder", f"{match!r} was left in. Say it, or leave the section out.")


def _snippets(text: str, body: str) -> Iterator[Finding]:
    for i, code in enumerate(_CODE.findall(body), start=1):
        try:
            ast.parse(code)
        except SyntaxError as error:
            yield Finding("snippet", f"Python block {i} does not compile: {error.msg}, line {error.lineno} of it.")
        if re.search(r"from_pretrained\(\s*[\"'](?:/|~|\.{1,2}/)", code):
            yield Finding("snippet", f"Python block {i} loads a local path; a reader has only the Hub id.")


def _files(body: str, folder: Path) -> Iterator[Finding]:
    for match in _IMAGE.finditer(body):
        target = match[1] or match[2]
        if "://" not in target and not target.startswith("data:") and not (folder / target).is_file():
            yield Finding("image", f"the picture {target} is not in the folder. Draw it, or take it out of the card.")
    for target in dict.fromkeys(_LINK.findall(body)):
        file = target.partition("#")[0]
        if file and "://" not in target and not target.startswith("mailto:") and not (folder / file).exists():
            yield Finding("link", f"the link {target} leads to no file of the folder.")


def _numbers(metadata: Mapping[str, Any], text: str, body: str, folder: Path) -> Iterator[Finding]:
    """A generated card, its results file and its model-index must say the same."""
    if not is_generated(text) or not (folder / _RESULTS).is_file():
        return
    from hf_continual.hub.folder_facts import evaluation_from

    try:
        data = json.loads((folder / _RESULTS).read_text(encoding="utf-8"))
        evaluation = evaluation_from(data)
        figures = evaluation.figures
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        yield Finding("numbers", f"{_RESULTS} cannot be read: {error}.")
        return
    for name, value in figures.items():
        if not _same(data.get(name), value):
            yield Finding("numbers", f"{_RESULTS} says {name}={data.get(name)!r}, its matrix gives {value!r}.")
    shown = [*(v for row in evaluation.matrix for v in row), *(evaluation.base_row or ()), *figures.values()]
    for value in dict.fromkeys(v for v in shown if v is not None):
        if number(value) not in body:
            yield Finding(
                "numbers", f"{_RESULTS} holds {number(value)}, which the card does not show. Render it again."
            )
    last = dict(zip(evaluation.tasks, evaluation.matrix[-1], strict=False)) if evaluation.matrix else {}
    known: dict[str, float | None] = {**figures, **{f"task {t}": v for t, v in last.items()}}
    for result in _results(metadata):
        for metric in result["metrics"]:
            whole = result["dataset"].get("type") == "task-sequence"
            key = metric["type"] if whole else f"task {result['dataset'].get('name')}"
            if key in known and not _same(metric["value"], known[key]):
                yield Finding("numbers", f"model-index says {key}={metric['value']!r}, {_RESULTS} {known[key]!r}.")


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
