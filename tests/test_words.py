"""Plain English: phrases that a native engineer would not write do not come back."""

from __future__ import annotations

import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Files and folders whose words are checked.
CHECKED = ("README.md", "Makefile", "notebooks", "recipes", "model_cards", "hf_continual")
# Texts that are data, not documentation.
LEFT_OUT = ("hf_continual/demo/general_text.py", "hf_continual/data/biography.py")
SUFFIXES = (".py", ".md", ".yaml", ".ipynb")

# Pattern -> what to write instead.
WORDS = {
    r"(?<!here )(?<!that )\b(?:is|are|was|were|be) no (?!longer\b|limit\b|more\b|better\b|worse\b)(?=[a-z`])": "is not a",
    r"\bbehind (?:the|it|its|them|each|this|that)\b": "after (order), or behind only for a cause",
    r"\bbeside\b": "next to, on top of, as well as",
    r"\b(?:go|goes|going|gone|went) on(?! top\b)\b": "resume, continue",
    r"\blearnt\b": "learned",
    r"\bfor ever\b": "forever",
    r"\banew\b": "again, from scratch",
    r"\bbeneath\b": "under, below",
    r"\bwhoever\b": "say what does it: other code, the caller",
    r"\b(?:somebody|nobody) (?:else|foresaw|left|knows|reads|said|noted)\b": "someone else, no one; or say what does it",
    r"\bforetells?\b": "estimates",
    r"\b(?:not foreseen|unforeseen)\b": "unexpected",
    r"\bof one's own\b": "your own",
    r"\b(?:of|in) (?:its|their) own(?=[.,;:)]|$)": "its own X, a separate X",
    r"\btold to (?:stop|go|say)\b": "asked to",
    r"\bhow far (?:it|the|a) \w+ (?:is|was)\b": "progress of",
    r"\b(?:is|are|was|were) said\b": "reported, logged, stated",
    r"\bat most so many\b": "maximum number of",
    r"\bthe very (?:rows|same|weights|code|ones|prompts)\b": "the same, exactly the",
    r"\bmade ready\b": "prepared",
    r"\bwhere there (?:is|are) (?:one|several|none)\b": "if there is one",
    r"\bbr(?:ing|ings|ought) an optimizer\b": "supplies an optimizer",
    r"\bspeaks? the model's\b": "name the property",
    r"\bmeant on purpose\b": "intended",
    r"\b(?:as|like) (?:the|a|its|their) \w+ (?:has|have) it\b": "as in",
    r"\bwhat became of\b": "what happened to, the change in",
    r"\bwhat of (?:a|an|the|it|its)\b": "which of",
    r"\bwhere nothing is\b": "that does not exist",
    r"\b[Tt]ype (?:of the|in which the|that the) (?:weights|output's weights|model is trained)": "dtype",
}
ANY = re.compile("|".join(WORDS), re.IGNORECASE)


def _files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", *CHECKED], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    named = [name for name in listed.stdout.splitlines() if name.endswith(SUFFIXES) or name == "Makefile"]
    return [name for name in named if name not in LEFT_OUT and (ROOT / name).is_file()]


def texts(source: str, python: bool) -> Iterator[tuple[int, str]]:
    """Lines of docstrings, comments and strings of a Python file, or all lines of another, with their numbers."""
    if not python:
        yield from enumerate(source.splitlines(), 1)
        return
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in kinds and " " in token.string:  # one word is a key, or the name of a file
            yield from enumerate(token.string.splitlines(), token.start[0])


def findings(source: str, python: bool = True) -> list[tuple[int, str, str]]:
    """Line, phrase and better words of every pattern found."""
    return [
        (number, found.group(), better)
        for number, line in texts(source, python)
        if ANY.search(line)
        for pattern, better in WORDS.items()
        for found in re.finditer(pattern, line, re.IGNORECASE)
    ]


def test_no_phrase_is_word_for_word_german():
    bad = [
        f"{name}:{number}: {phrase!r}; better: {better}"
        for name in _files()
        for number, phrase, better in findings((ROOT / name).read_text(encoding="utf-8"), name.endswith(".py"))
    ]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ('"""This is no adapter."""', 1),
        ("x = f'{y} is no JSON'", 1),
        ("# There is no adapter, and it is no longer needed.", 0),
        ("goes_on = beside  # names are not words", 0),
        ('"""It goes on behind the last one."""', 2),
        ('"""A new adapter goes on top."""', 0),
        ('"""Learnt anew, beside it."""', 3),
    ],
)
def test_what_is_found(line, number):
    assert len(findings(line)) == number
