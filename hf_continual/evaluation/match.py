"""When is an answer right? The rules of the papers by name, as functions of (prediction, reference)."""

from __future__ import annotations

import difflib
import functools
import string
from collections.abc import Callable

from hf_continual.named import imported

Match = Callable[[str, str], float]

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact(prediction: str, reference: str) -> float:
    """1 if both are the same text, to the last space."""
    return float(prediction == reference)


def stripped(prediction: str, reference: str) -> float:
    """1 if both are the same but for space around them."""
    return float(prediction.strip() == reference.strip())


def lower_exact(prediction: str, reference: str) -> float:
    """1 if both are the same but for case and space around them (Recurrent-KIF, Spurious Forgetting)."""
    return float(prediction.strip().lower() == reference.strip().lower())


def normalized(prediction: str, reference: str) -> float:
    """1 if both are the same after lower-casing, dropping punctuation and joining spaces (O-LoRA, SAPT)."""
    return float(_plain(prediction) == _plain(reference))


def prefix(prediction: str, reference: str) -> float:
    """1 if the prediction begins with the reference, by the rule of `normalized`: generous to models that go on."""
    said, wanted = _plain(prediction).split(), _plain(reference).split()
    return float(bool(wanted) and said[: len(wanted)] == wanted)


def similarity(prediction: str, reference: str) -> float:
    """Ratio of matching characters of two texts, 0 to 1 (TRACE's Py150)."""
    return difflib.SequenceMatcher(None, prediction.strip(), reference.strip()).ratio()


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
    f.__name__: f for f in (exact, stripped, lower_exact, normalized, prefix, similarity, rouge1, rouge2, rougeL)
}


def find_match(name: str | Match) -> Match:
    """A rule by name.

    Args:
        name: A key of `MATCHES`, ``"package.module:function"``, or a function.

    Returns:
        A function of prediction and reference.

    Raises:
        ValueError: If there is none.
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
    raise ValueError(f"unknown match {name!r}; known are {', '.join(MATCHES)}, or 'package.module:function'.")
