"""Load a saved model, and score it on rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_continual.atomic_files import write_lines
from hf_continual.data.columns import check_columns, take
from hf_continual.data.rows import load_rows
from hf_continual.evaluation.table import build_scorer, columns_of, with_labels
from hf_continual.stream.models import load_finished, load_tokenizer
from hf_continual.stream.plan import ModelPlan, Plan, TaskPlan
from hf_continual.stream.plan_lines import Where
from hf_continual.stream.scores import prediction_lines, score_entry
from hf_continual.stream.start import split_adapter


def loaded(model: ModelPlan) -> tuple[Any, Any, str]:
    """Load a model for generation.

    Args:
        model: The model to load; a `path` that is an adapter is loaded onto its base.

    Returns:
        The model, its tokenizer, and its name.
    """
    named = model.adapter or model.path
    plan = Plan(model=model, output_dir="", tasks=[TaskPlan(name="score", train="")])
    plan = split_adapter(plan, Where("the command line"))
    return load_finished(plan, None), load_tokenizer(plan.model), named


def score_model(
    model: ModelPlan, test: str, metric: Any, split: str, limit: int | None, batch_size: int, predictions: Path | None
) -> dict[str, Any]:
    """Score a model on rows.

    Args:
        model: The model to load.
        test: The rows; see `load_rows`.
        metric: A description of a scorer.
        split: Split of the rows.
        limit: Maximum number of rows, drawn with seed 0.
        batch_size: Rows per forward pass.
        predictions: File for the predictions, or None.

    Returns:
        The score as plain data, with ``model`` and ``test``.

    Raises:
        ValueError: If the rows or the metric cannot be used.
    """
    build_scorer(metric, batch_size)
    rows = take(load_rows(test, split, columns_of(metric)), limit, 0)
    check_columns(rows, columns_of(metric, rows.column_names), f"scoring {test}")
    scorer = build_scorer(with_labels(metric, rows), batch_size)
    live, tokenizer, named = loaded(model)
    scored = scorer(live, tokenizer, rows)
    if predictions is not None:
        write_lines(predictions, prediction_lines(rows, scored))
    return {"model": named, "test": test, **score_entry(scored)}
