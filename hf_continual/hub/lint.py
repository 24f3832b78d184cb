"""An offline linter for model cards: what the Hub would refuse, and what a reader should never see."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hf_continual.hub.lint_claims import check_claims
from hf_continual.hub.lint_metadata import check_metadata
from hf_continual.hub.lint_numbers import check_numbers
from hf_continual.hub.pictures import problem, shown
from hf_continual.hub.text import PATH, PLACEHOLDER, TOKEN, read_card

_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"^```(?:python|py)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_RESULTS, _CONFIG = "continual_results.json", "continual_config.json"


@dataclass(frozen=True)
class Finding:
    """A problem of a card.

    Args:
        rule: Name of the rule.
        message: What was found, why it is a problem, what to do.
        is_claim: Whether it is a number that the author is responsible for, which does not stop a push.
    """

    rule: str
    message: str
    is_claim: bool = False

    def __str__(self) -> str:
        return f"[{self.rule}] {self.message}"


def lint_card(text: str, folder: Path | None = None) -> list[Finding]:
    """Check a card without any network.

    Args:
        text: The card.
        folder: The model's folder, for images, links and the numbers in ``continual_results.json``.

    Returns:
        The problems found; nothing for a clean card.
    """
    try:
        metadata, body = read_card(text)
    except ValueError as error:
        return [Finding("metadata", f"{error}. The Hub refuses the whole push.")]
    found = [] if metadata else [Finding("metadata", "the card has no metadata. Start it with a '---' block.")]
    found += [Finding(rule, message) for rule, message in check_metadata(metadata)]
    for check in (_tokens, _paths, _placeholders, _snippets):
        found += check(text, body)
    if folder is not None:
        found += _files(body, folder)
        found += [Finding(rule, message) for rule, message in check_numbers(metadata, text, body, folder)]
        found += [Finding(rule, message, is_claim=True) for rule, message in check_claims(text, body, folder)]
    return found


def lint_folder(folder: Path) -> list[Finding]:
    """Check the card of a folder, and that it agrees with the files next to it."""
    file = folder / "README.md"
    if not file.is_file():
        return [Finding("card", f"{folder} holds no README.md. Write one, or render it: render_card({str(folder)!r}).")]
    found = lint_card(file.read_text(encoding="utf-8", errors="replace"), folder)
    for name in (_CONFIG, _RESULTS, "adapter_config.json"):
        if (folder / name).is_file():
            found += [
                Finding(f.rule, f"{name}: {f.message}")
                for f in _tokens((folder / name).read_text(encoding="utf-8", errors="replace"), "")
            ]
    return found


def _tokens(text: str, body: str) -> Iterator[Finding]:
    for match in TOKEN.finditer(text):
        yield Finding(
            "token", f"something that looks like an access token ({match[0][:3]}...). Revoke it and remove it."
        )


def _paths(text: str, body: str) -> Iterator[Finding]:
    for match in dict.fromkeys(m[0] for m in PATH.finditer(text)):
        yield Finding("path", f"{match!r} is a local path that means nothing to a reader. Name the model or file.")


def _placeholders(text: str, body: str) -> Iterator[Finding]:
    prose = re.sub(r"^```.*?^```", "", body, flags=re.DOTALL | re.MULTILINE)
    for match in dict.fromkeys(m[0].strip() for m in PLACEHOLDER.finditer(prose)):
        yield Finding("placeholder", f"{match!r} is a placeholder. Fill it in, or remove the section.")


def _snippets(text: str, body: str) -> Iterator[Finding]:
    for i, code in enumerate(_CODE.findall(body), start=1):
        try:
            ast.parse(code)
        except SyntaxError as error:
            yield Finding("snippet", f"Python block {i} does not compile: {error.msg}, line {error.lineno} of it.")
        if re.search(r"from_pretrained\(\s*[\"'](?:/|~|\.{1,2}/)", code):
            yield Finding("snippet", f"Python block {i} loads a local path; readers only have the Hub id.")


def _files(body: str, folder: Path) -> Iterator[Finding]:
    for target in shown(body):
        if (said := problem(target, folder)) is not None:
            yield Finding("image", said)
    for target in dict.fromkeys(_LINK.findall(body)):
        file = target.partition("#")[0]
        if file and "://" not in target and not target.startswith("mailto:") and not (folder / file).exists():
            yield Finding("link", f"the link {target} does not lead to a file in the folder.")
