"""Describe what a plan will do and cost, before any weights are loaded."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from hf_continual.evaluation.trained import conversation_tokens
from hf_continual.methods.base import AddedRows
from hf_continual.progress import over
from hf_continual.stream.check_run import check_curve, notes
from hf_continual.stream.models import adapter_to_add
from hf_continual.stream.on_paper import explained, on_paper, place_of_methods, steps_of
from hf_continual.stream.prepare import Prepared
from hf_continual.stream.start import said_of_start
from hf_continual.tasks import Task
from hf_continual.tensors.reference import tokens_in_front


def describe(prepared: Prepared) -> dict[str, Any]:
    """Tasks, rows, tokens, replay, trainable parameters, memory, steps and disk of one run.

    Memory is the sum of weights, gradients and optimizer state of one process that holds all of them (exact), and
    of the activations (a rough figure: 16 values per token, channel and block, or 2 with checkpointing).

    Args:
        prepared: The prepared plan.

    Returns:
        Plain data: ``tasks`` one entry each, and totals.
    """
    tasks = [_task(prepared, task) for task in prepared.stream]
    shared = {k: tasks[0][k] for k in ("parameters", "weights_bytes")}
    return {
        "model": prepared.plan.model.path,
        "output_dir": prepared.plan.output_dir,
        "start": said_of_start(prepared.plan),
        "notes": notes(prepared),
        "between_tasks": "merge" if prepared.plan.merge else prepared.plan.between_tasks,
        "processes": PartialState().num_processes,
        **shared,
        "tasks": tasks,
        "gauges": {name: None if rows is None else len(rows) for name, rows in prepared.gauges.items()},
        "scored_rows": sum(len(t.test or ()) for t in prepared.columns_after(None))
        * bool(prepared.plan.evaluation.base)
        + sum(len(c.test or ()) for t in prepared.stream for c in prepared.columns_after(t)),
        "steps": sum(t["steps"] for t in tasks),
        "memory_bytes": max(t["memory_bytes"] for t in tasks),
        "memory_here_bytes": _memory_here(),
        "disk_bytes": sum(t["disk_bytes"] for t in tasks) + max(t["checkpoint_bytes"] for t in tasks),
    }


def _task(prepared: Prepared, task: Task) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        args = prepared.config(task, Path(folder))
    methods = prepared.methods(task)
    model, total, weights = on_paper(prepared.plan, prepared.where, methods)
    with explained(prepared.where, place_of_methods(prepared, task)):
        for method in methods:
            method.prepare_model(model, task)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lengths = token_counts(prepared, task, args.max_length)
    steps = steps_of(args, len(lengths), sum(lengths), max(lengths))
    check_curve(prepared, task, steps)
    mixed = [added for m in methods if (added := m.added_rows()) is not None]
    share = sum(added.ratio or 0.0 for added in mixed)
    longest = args.max_length if args.packing and args.max_length else max(lengths)
    added, tokens = _micro_batch(args, mixed, longest, share)
    config = model.config
    values = 2 if args.gradient_checkpointing else 16
    kept = 2.0 if args.bf16 or prepared.plan.model.dtype in ("bfloat16", "float16") else 4.0
    front = tokens_in_front(model) * (args.per_device_train_batch_size + added)
    activations = (tokens + front) * config.hidden_size * config.num_hidden_layers * values * kept
    state = 8.0 + sum(type(m).bytes_per_parameter for m in methods)
    grown = trainable * (task.index + 1 if prepared.plan.between_tasks == "new_adapter" else 1)
    saved = 4.0 * grown if adapter_to_add(prepared.plan, methods) is not None else weights
    return {
        "name": task.name,
        "parent": getattr(prepared.stream.parent(task), "name", "base"),
        "rows": len(lengths),
        "tokens": sum(lengths),
        "test_rows": len(task.test) if task.test is not None else None,
        "steps": steps,
        "gradient_checkpointing": bool(args.gradient_checkpointing),
        "accumulation": args.gradient_accumulation_steps,
        "extra_steps": sum(m.extra_steps(steps) for m in methods),
        "methods": [m.name for m in methods],
        "memory_rows": None
        if prepared.memory is None
        else {"given": len(prepared.memory.given(task)), "kept": len(prepared.memory.after[task.name])},
        "replay_share": share,
        "micro_batch": {"task_rows": args.per_device_train_batch_size, "added_rows": added, "tokens": tokens},
        "parameters": total,
        "trainable": trainable,
        "weights_bytes": weights,
        "memory_bytes": weights + trainable * (4.0 + state) + activations,
        "disk_bytes": saved,
        "checkpoint_bytes": (saved + trainable * state) * ((args.save_total_limit or 1) + 1)
        if args.save_strategy != "no"
        else 0.0,
    }


def _micro_batch(args: Any, mixed: Sequence[AddedRows], longest: int, share: float) -> tuple[int, int]:
    """Minimum number of rows that methods add to a micro-batch, and its maximum number of tokens, including padding."""
    rows = args.per_device_train_batch_size
    widest = max([longest, *(m.max_length or longest for m in mixed)])
    widest = min(widest, args.max_length or widest)
    added = sum(m.per_batch or 0 for m in mixed)
    owed = rows * longest * share / (1 - share)
    if args.packing or args.padding_free:
        return added, round(rows * longest + owed + added * widest)
    added += math.ceil(owed / widest)
    return added, (rows + added) * widest  # every row is padded to the widest


def _memory_here() -> int:
    """Memory of the accelerator, or of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(PartialState().local_process_index).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def token_counts(prepared: Prepared, task: Task, max_length: int | None) -> list[int]:
    """Number of tokens of each training row after truncation."""
    tokenizer, rows = prepared.tokenizer, task.train
    assert rows is not None
    columns = set(rows.column_names)
    if "input_ids" in columns:
        lengths = [len(ids) for ids in rows["input_ids"]]
    elif "text" in columns:
        lengths = _lengths(tokenizer, rows["text"][:])
    elif "prompt" in columns and isinstance(rows[0]["prompt"], str):
        pairs = zip(rows["prompt"], rows["completion"], strict=True)
        lengths = _lengths(tokenizer, [p + c for p, c in pairs])
    else:
        lengths = [len(conversation_tokens(row, tokenizer)) for row in over(rows, "counting tokens", " rows")]  # pyrefly: ignore
    return lengths if max_length is None else [min(n, max_length) for n in lengths]


def _lengths(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text with the one that ends it."""
    parts = range(0, len(texts), 1000)
    found = (tokenizer(list(texts[i : i + 1000]))["input_ids"] for i in over(parts, "counting tokens", "k rows"))
    return [len(ids) + 1 for part in found for ids in part]
