"""A card's metadata: the keys that the Hub reads, from the facts."""

from __future__ import annotations

import math
from typing import Any

from hf_continual.hub.facts import CardFacts, Evaluation
from hf_continual.hub.refs import is_hub_id

LIBRARY_TAG = "hf_continual"


def card_metadata(facts: CardFacts) -> dict[str, Any]:
    """Build the metadata in the order in which it is written; unknown values are left out.

    Args:
        facts: The facts.

    Returns:
        Plain data for the YAML head.
    """
    bases = facts.base_models
    tags = ["continual-learning", LIBRARY_TAG, *(m.name for m in facts.methods)]
    if facts.merge is not None:
        tags += ["merge", facts.merge.method]
    if facts.kind == "adapter" and "kind" not in facts.adapter:
        tags.append("lora")
    tags += facts.tags
    datasets = dict.fromkeys(t.dataset for t in facts.tasks if is_hub_id(t.dataset))
    index = model_index(facts)
    found = {
        "base_model": bases[0] if len(bases) == 1 and facts.relation != "merge" else bases,
        "base_model_relation": facts.relation if bases else None,
        "library_name": "peft" if facts.kind == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "license": facts.license,
        "license_name": facts.license_name,
        "license_link": facts.license_link,
        "language": list(facts.languages),
        "datasets": list(datasets),
        "tags": list(dict.fromkeys(tags)),
        "metrics": [_metric(facts.evaluation)] if index else [],
        "model-index": index,
    }
    return {key: value for key, value in found.items() if value not in (None, [], "")}


def _metric(evaluation: Evaluation) -> str:
    """Id of the tasks' metric: its own name if it is one of the Hub's, else accuracy or loss."""
    name = (evaluation.metric or "").split(",")[0].split(" (")[0].strip().lower().replace(" ", "_")
    if name in ("accuracy", "exact_match", "f1", "rouge", "perplexity", "bleu"):
        return name
    return "loss" if evaluation.lower_is_better else "accuracy"


def model_index(facts: CardFacts) -> list[dict[str, Any]]:
    """The last row of the matrix, and the figures computed from it, as the Hub's results.

    Args:
        facts: The facts.

    Returns:
        A model-index with one entry, or nothing if nothing was measured.
    """
    evaluation = facts.evaluation
    if not evaluation.matrix:
        return []
    datasets = {t.name: t for t in facts.tasks}
    results = []
    for task, value in zip(evaluation.tasks, evaluation.matrix[-1], strict=False):
        if value is None or not math.isfinite(value):
            continue
        known = datasets.get(task)
        dataset: dict[str, Any] = {"type": known.dataset if known and known.dataset else task, "name": task}
        if known and known.dataset and known.dataset_config:
            dataset["config"] = str(known.dataset_config)
        if known and known.dataset and known.dataset_revision:
            dataset["revision"] = str(known.dataset_revision)
        metric = {"type": _metric(evaluation), "value": value, "name": evaluation.metric or _metric(evaluation)}
        results.append({"task": {"type": "text-generation"}, "dataset": dataset, "metrics": [metric]})
    figures = [
        {"type": name, "value": value, "name": TITLES[name]}
        for name, value in evaluation.figures.items()
        if value is not None and math.isfinite(value)
    ]
    if figures:
        whole = {"type": "task-sequence", "name": ", ".join(evaluation.tasks)}
        results.append({"task": {"type": "text-generation"}, "dataset": whole, "metrics": figures})
    name = (facts.repo_id or facts.name).split("/")[-1]
    return [{"name": name, "results": results}] if results else []


TITLES = {
    "op": "overall performance (OP)",
    "bwt": "backward transfer (BWT)",
    "fwt": "forward transfer (FWT)",
    "forgetting": "forgetting",
}
