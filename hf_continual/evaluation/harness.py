"""EleutherAI's lm-evaluation-harness as a scorer, in process on the live model (``pip install 'hf-continual[lm-eval]'``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_continual.evaluation.prompts import evaluating
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
        rows: Not used: the harness brings its own rows.
        task: Name of a task, such as ``"arc_easy"``. Its data come from the Hub unless `include_path` says else.
        metric: Name of one of the task's metrics for each sample, such as ``"acc"`` or ``"acc_norm"``.
        limit: First samples of the task only.
        num_fewshot: Examples in the prompt; None is the task's default.
        batch_size: Requests per forward pass.
        include_path: Folder with task files of one's own.

    Returns:
        One entry per sample.

    Raises:
        ImportError: If the harness is not installed.
        ValueError: If the task or its metric is unknown.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            "the metric lm_eval needs the package of that name: pip install 'hf-continual[lm-eval]'."
        ) from error
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
    samples = sorted(found["samples"][task], key=lambda s: s["doc_id"])
    if samples and metric not in samples[0]:
        known = ", ".join(sorted(found["results"][task]))
        raise ValueError(f"lm_eval: the task {task!r} has no metric {metric!r} for each sample; it reports {known}.")
    scored = [
        RowScore(float(s[metric]), prediction=str(s["filtered_resps"]), reference=str(s["target"])) for s in samples
    ]
    return Scored(scored, f"lm_eval {task}, {metric}")
