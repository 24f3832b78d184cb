"""EleutherAI's lm-evaluation-harness as a scorer, in process on the live model (``pip install 'hf-continual[lm-eval]'``)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hf_continual.evaluation.prompts import NOT_NUMBERS, evaluating
from hf_continual.evaluation.result import RowScore, Scored


def lm_eval(
    model: Any,
    tokenizer: Any,
    rows: Any = None,
    task: str = "",
    metric: str = "acc",
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    include_path: str | None = None,
) -> Scored:
    """Score a model on one task of the harness, without loading it again.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        rows: Unused: the harness has its own rows.
        task: Name of a task, such as ``"arc_easy"``. Its data comes from the Hub unless `include_path` says otherwise.
        metric: Name of one of the task's metrics for each sample, such as ``"acc"`` or ``"acc_norm"``; if a task
            reads answers in several ways, followed by the name of one, such as ``"exact_match,strict-match"``.
        limit: Use only the first samples of the task.
        num_fewshot: Examples in the prompt; None is the task's default.
        batch_size: Requests per forward pass.
        include_path: Folder with your own task files.

    Returns:
        One entry per sample.

    Raises:
        ImportError: If the harness is not installed.
        ValueError: If the task or its metric is unknown, the task is a group, or the model's logits are not numbers.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            "the metric lm_eval needs the package of that name: pip install 'hf-continual[lm-eval]'."
        ) from error
    name, _, chosen = metric.partition(",")
    manager = TaskManager(include_path=None if include_path is None else str(Path(include_path).resolve()))
    if task not in manager.all_tasks:
        raise ValueError(
            f"lm_eval knows no task {task!r} among its {len(manager.all_tasks)}; `lm-eval ls tasks` lists them."
        )
    with evaluating(model):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found: Any = simple_evaluate(
            model=wrapped, tasks=[task], limit=limit, num_fewshot=num_fewshot, task_manager=manager, bootstrap_iters=0,
            log_samples=True,
        )  # fmt: skip
    scored = [_row(s, task, name) for s in _samples(found, task, name, chosen)]
    return Scored(scored, f"lm_eval {task}, {metric}")


def _samples(found: Any, task: str, metric: str, chosen: str) -> list[dict[str, Any]]:
    """Select the samples of one task by one of its filters, in the order of its rows."""
    if task not in found["samples"]:
        raise ValueError(
            f"lm_eval: {task!r} is a group of the tasks {', '.join(sorted(found['samples']))}; name one of them."
        )
    samples = sorted(found["samples"][task], key=lambda s: s["doc_id"])
    filters = list(dict.fromkeys(s.get("filter", "none") for s in samples))
    if samples and chosen not in (filters if chosen or len(filters) > 1 else [chosen]):
        raise ValueError(
            f"lm_eval: the task {task!r} reads answers in {len(filters)} ways; choose one, as metric: "
            f"{' or '.join(repr(f'{metric},{name}') for name in filters)}."
        )
    samples = [s for s in samples if not chosen or s.get("filter", "none") == chosen]
    if samples and metric not in samples[0]:
        known = ", ".join(sorted(found["results"][task]))
        raise ValueError(f"lm_eval: the task {task!r} has no metric {metric!r} for each sample; it reports {known}.")
    return samples


def _row(sample: dict[str, Any], task: str, metric: str) -> RowScore:
    value = sample[metric]
    if not isinstance(value, int | float):
        raise ValueError(
            f"lm_eval: the metric {metric!r} of the task {task!r} is computed over all samples (each gives {value!r}); choose "
            f"one that is a number for each sample."
        )
    if math.isnan(value) or _not_numbers(sample["filtered_resps"]):
        raise ValueError(NOT_NUMBERS)
    return RowScore(float(value), prediction=str(sample["filtered_resps"]), reference=str(sample["target"]))


def _not_numbers(answers: Any) -> bool:
    if isinstance(answers, list | tuple):
        return any(_not_numbers(answer) for answer in answers)
    return isinstance(answers, float) and math.isnan(answers)
