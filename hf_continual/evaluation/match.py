"""When an answer is right: the papers' rules by name, as functions of (prediction, reference)."""

from __future__ import annotations

import difflib
import functools
import json
import string
from collections.abc import Callable

from hf_continual.named import imported

Match = Callable[[str, str], float]

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact(prediction: str, reference: str) -> float:
    """1 if both are the same text, to the last space."""
    return float(prediction == reference)


def stripped(prediction: str, reference: str) -> float:
    """1 if both are the same apart from surrounding whitespace."""
    return float(prediction.strip() == reference.strip())


def lower_exact(prediction: str, reference: str) -> float:
    """1 if both are the same apart from case and surrounding whitespace (Recurrent-KIF, Spurious Forgetting)."""
    return float(prediction.strip().lower() == reference.strip().lower())


def normalized(prediction: str, reference: str) -> float:
    """1 if both are the same after lower-casing, dropping punctuation and joining spaces (O-LoRA, SAPT)."""
    return float(_plain(prediction) == _plain(reference))


def prefix(prediction: str, reference: str) -> float:
    """1 if the prediction starts with the reference, after `normalized`: lenient towards models that do not stop."""
    said, wanted = _plain(prediction).split(), _plain(reference).split()
    return float(bool(wanted) and said[: len(wanted)] == wanted)


def similarity(prediction: str, reference: str) -> float:
    """Ratio of matching characters of two texts, 0 to 1 (TRACE's Py150)."""
    return difflib.SequenceMatcher(None, prediction.strip(), reference.strip()).ratio()


def tool_calls(prediction: str, reference: str) -> float:
    """1 if both call the same tools with the same arguments in the same order, regardless of how the JSON is written.

    Calls are JSON objects with a `name` and `arguments` (or `parameters`). A reference without calls is compared as by
    `stripped`: rows that call tools and rows that answer in words can be mixed in one test.
    """
    wanted = _calls(reference)
    return float(_calls(prediction) == wanted) if wanted else stripped(prediction, reference)


def _calls(text: str) -> list[tuple[str, object]]:
    """Names and arguments of the calls in a text."""
    found, place = [], text.find("{")
    while place >= 0:
        try:
            data, end = json.JSONDecoder().raw_decode(text, place)
        except (ValueError, RecursionError):
            data, end = None, place + 1
        if isinstance(data, dict) and isinstance(data.get("name"), str):
            given = data.get("arguments", data.get("parameters", {}))
            found.append((data["name"], _plain_arguments(given)))
        place = text.find("{", end)
    return found


def _plain_arguments(given: object) -> object:
    """Arguments as data; some datasets and templates write them as JSON in a string."""
    try:
        return json.loads(given) if isinstance(given, str) else given
    except ValueError:
        return given


def rouge1(prediction: str, reference: str) -> float:
    """F-measure of shared words, stemmed (rouge_score)."""
    return _rouge("rouge1", prediction, reference)


def rouge2(prediction: str, reference: str) -> float:
    """F-measure of shared pairs of words, stemmed (rouge_score)."""
    return _rouge("rouge2", prediction, reference)


def rougeL(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words, stemmed (rouge_score)."""
    return _rouge("rougeL", prediction, reference)


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


@functools.cache
def _scorer(kind: str) -> object:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], use_stemmer=True)


def _rouge(kind: str, prediction: str, reference: str) -> float:
    return _scorer(kind).score(reference, prediction)[kind].fmeasure  # pyrefly: ignore[missing-attribute]


MATCHES: dict[str, Match] = {
    f.__name__: f
    for f in (exact, stripped, lower_exact, normalized, prefix, similarity, tool_calls, rouge1, rouge2, rougeL)
}


def find_match(name: str | Match) -> Match:
    """Look up a rule by name.

    Args:
        name: A key of `MATCHES`, ``"package.module:function"``, or a function.

    Returns:
        A function of prediction and reference.

    Raises:
        ValueError: If it does not exist.
    """
    if callable(name):
        return name
    if name in MATCHES:
        return MATCHES[name]
    if ":" in name:
        try:
            return imported(name)
        except ImportError as error:
            raise ValueError(f"match={name!r} cannot be imported: {error}.") from error
    raise ValueError(f"unknown match {name!r}; the rules are {', '.join(MATCHES)}, or 'package.module:function'.")
