"""Scorers and rules of matching by name, and custom functions."""

from __future__ import annotations

import pytest
from rouge_score.rouge_scorer import RougeScorer

from hf_continual.evaluation.match import MATCHES, find_match
from hf_continual.evaluation.table import SCORERS, build_scorer, columns_of, with_labels
from tests import toy


def lengths(model, tokenizer, rows):
    """A custom scorer: a number per row."""
    return [len(row["completion"]) for row in rows]


def shout(prediction, reference):
    """A custom rule."""
    return float(prediction.upper() == reference.upper())


@pytest.mark.parametrize(
    ("name", "prediction", "reference", "score"),
    [
        ("exact", "Sports", "Sports", 1), ("exact", " Sports", "Sports", 0), ("stripped", " Sports ", "Sports", 1),
        ("stripped", "sports", "Sports", 0), ("lower_exact", " sports ", "Sports", 1), ("lower_exact", "sports.", "Sports", 0),
        ("normalized", "Science,  or technology!", "science or Technology", 1), ("normalized", "science", "Sports", 0),
        ("prefix", "Sports, of course", "sports", 1), ("prefix", "Sportsman", "sports", 0), ("prefix", "", "", 0),
        ("similarity", "abcd", "abcd", 1), ("similarity", "abcd", "wxyz", 0), ("similarity", "abcd", "abxy", 0.5),
    ],
)  # fmt: skip
def test_matches_by_hand(name, prediction, reference, score):
    assert MATCHES[name](prediction, reference) == score


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_rouge_score(kind):
    said, wanted = "the cats were sitting on a mat", "a cat sat on the mat"
    assert MATCHES[kind](said, wanted) == RougeScorer([kind], use_stemmer=True).score(wanted, said)[kind].fmeasure


def test_functions_of_ones_own():
    rows = toy.rows("prompt_completion", number=3)
    scored = build_scorer("tests.evaluation.test_table:lengths")(None, None, rows)
    assert [r.score for r in scored.rows] == [len(c) for c in rows["completion"]]
    assert build_scorer(lengths)(None, None, rows).score == scored.score or scored.protocol != "lengths"
    assert find_match("tests.evaluation.test_table:shout")("a", "A") == 1
    with pytest.raises(ValueError, match="returned 1 scores for 3 rows"):
        build_scorer(lambda model, tokenizer, rows: [1.0])(None, None, rows)
    with pytest.raises(TypeError, match="returned str; a scorer must return Scored, or one number per row"):
        build_scorer(lambda model, tokenizer, rows: "good")(None, None, rows)


def test_descriptions_are_checked():
    for name in SCORERS:
        build_scorer(name)
    build_scorer({"generated": {"match": "rougeL", "stop": ["\n"]}}, batch_size=4)
    with pytest.raises(ValueError, match=r"unknown metric 'exact_mach'. Did you mean 'exact_match'\?"):
        build_scorer("exact_mach")
    with pytest.raises(ValueError, match=r"generated has no option 'stops'. Did you mean 'stop'\?"):
        build_scorer({"generated": {"stops": []}})
    with pytest.raises(ValueError, match="unknown match 'rouge3'"):
        build_scorer({"generated": {"match": "rouge3"}})
    with pytest.raises(ValueError, match="'nowhere:f' cannot be imported"):
        build_scorer("nowhere:f")
    with pytest.raises(TypeError, match="a metric must be a name, or a mapping of one name to its options"):
        build_scorer({"generated": {}, "exact_match": {}})
    assert columns_of("exact_match") == ("prompt", "completion") and columns_of("a:b") == columns_of("lm_eval") == ()


def test_labels_are_fixed_from_all_rows():
    rows = [{"prompt": "p", "completion": c} for c in (" b", " a", " b")]
    assert with_labels("label_likelihood", rows) == {"label_likelihood": {"labels": [" a", " b"]}}
    given = {"label_likelihood": {"labels": [" x"]}}
    assert with_labels(given, rows) == given and with_labels("exact_match", rows) == "exact_match"
