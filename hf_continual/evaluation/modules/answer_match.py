"""The papers' rules for matching answers, as an `evaluate.Metric`."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from hf_continual.evaluation.match import find_match

DESCRIPTION = (
    "Fraction of predictions that match their reference, by one of the rules used in papers on continual learning."
)

INPUTS = """
Args:
    predictions: Texts.
    references: Texts.
    rule: exact, stripped, lower_exact, normalized, prefix, similarity, rouge1, rouge2 or rougeL.
Returns:
    The mean over the rows, by the name of the rule.
"""


class AnswerMatch(evaluate.Metric):
    """``evaluate.load(module_path("answer_match")).compute(predictions=[...], references=[...], rule="normalized")``."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(  # pyrefly: ignore[bad-override]
        self, predictions: Any, references: Any, rule: str = "normalized"
    ) -> dict[str, float]:
        match = find_match(rule)
        values = [match(said, wanted) for said, wanted in zip(predictions, references, strict=True)]
        return {rule: sum(values) / len(values)}
