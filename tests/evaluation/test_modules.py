"""The metrics through HuggingFace evaluate."""

from __future__ import annotations

import evaluate
import pytest

from hf_continual import AccuracyMatrix
from hf_continual.evaluation.modules import module_path

SCORES, BASE = [[0.9, 0.1], [0.5, 0.8]], [0.1, 0.05]

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_matrix():
    metric = evaluate.load(module_path("continual_learning"))
    matrix = AccuracyMatrix(SCORES, BASE)
    assert metric.compute(scores=SCORES, base=BASE) == {**matrix.summary, "per_task_minimum": matrix.per_task_minimum}
    half = metric.compute(scores=[[0.9, None], [0.5, 0.8]])
    assert half["forward_transfer"] is None and half["backward_transfer"] == pytest.approx(-0.4)


def test_matches():
    metric = evaluate.load(module_path("answer_match"))
    said, wanted = ["Sports!", "world", "no"], ["sports", "World ", "yes"]
    assert metric.compute(predictions=said, references=wanted) == {"normalized": pytest.approx(2 / 3)}
    assert metric.compute(predictions=said, references=wanted, rule="lower_exact") == {
        "lower_exact": pytest.approx(1 / 3)
    }


def test_unknown_modules():
    with pytest.raises(
        ValueError, match="unknown metric module 'bleu'; the modules are answer_match, continual_learning"
    ):
        module_path("bleu")
