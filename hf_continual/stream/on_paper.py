"""The model of a plan without weights: adapters and methods are tried on it before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from hf_continual.hub.damaged import loading
from hf_continual.inference.kinds import KindConfig
from hf_continual.methods.base import Method
from hf_continual.stream.models import adapter_to_add, local_adapter
from hf_continual.stream.plan import Plan
from hf_continual.stream.plan_lines import Key, Where
from hf_continual.stream.prepare import Prepared
from hf_continual.tasks import Task

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
FOUR_BIT = 0.56  # NF4 with its scales, per quantised weight


def on_paper(plan: Plan, where: Where, methods: Iterable[Method] = ()) -> tuple[Any, int, float]:
    """Build the model with its adapters on the meta device.

    Args:
        plan: As prepared.
        where: Places of its entries.
        methods: Those of a task, one of which may bring modules of its own.

    Returns:
        The model, its parameters without adapters, and the bytes of its weights.

    Raises:
        PlanError: If the adapters do not fit the model.
    """
    with loading(plan.model.path, "the base model"):
        config = AutoConfig.from_pretrained(plan.model.path, revision=plan.model.revision)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    dtype = (
        str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
        if plan.model.dtype == "auto"
        else plan.model.dtype
    )
    weights = total * BYTES.get(dtype, 4.0)
    if plan.model.quantization:
        linear = sum(
            m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n
        )
        each = FOUR_BIT if plan.model.quantization.get("load_in_4bit") else 1.0
        weights -= linear * (BYTES.get(dtype, 4.0) - each)
    adapter: Any = adapter_to_add(plan, methods)
    if adapter is None and plan.model.adapter is not None:
        adapter = PeftConfig.from_pretrained(str(local_adapter(plan.model.adapter)))
        adapter.inference_mode = False
    if adapter is not None:
        own = isinstance(adapter, KindConfig)
        place = ("methods",) if own else ("peft", "target_modules")
        with explained(where, place, None if own else model), torch.device("meta"):
            model = get_peft_model(model, adapter, low_cpu_mem_usage=True)
    return model, total, weights


@contextmanager
def explained(where: Where, path: tuple[Key, ...], model: Any = None) -> Iterator[None]:
    """Turn errors of adapters and methods inside the context into errors of the plan at this place.

    Args:
        where: Places of its entries.
        path: The place.
        model: The model whose modules are listed if an adapter matches none; None if the error says enough.

    Yields:
        None: While they are added to the model.

    Raises:
        PlanError: Instead of the original error.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        known = ""
        if model is not None:
            names = dict.fromkeys(n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear))
            known = f" Its linear modules are {', '.join(names)}; all-linear takes all except the head."
        raise where.error(path, f"{str(error).rstrip('.')}.{known}") from error


def place_of_methods(prepared: Prepared, task: Task) -> tuple[Key, ...]:
    """Place of a task's methods in the plan."""
    return ("methods",) if prepared.plan.tasks[task.index].methods is None else ("tasks", task.index, "methods")


def steps_of(args: Any, rows: int, tokens: int, longest: int) -> int:
    """Optimizer steps of a task.

    Args:
        args: Its training arguments.
        rows: Number of its rows.
        tokens: Number of their tokens; only read with packing.
        longest: Tokens of the longest row.

    Returns:
        The steps, exact except with packing.
    """
    if args.max_steps > 0:
        return args.max_steps
    batches = math.ceil(tokens / (args.max_length or longest)) if args.packing else rows
    batches = math.ceil(batches / (args.per_device_train_batch_size * PartialState().num_processes))
    per_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return math.ceil(per_epoch * args.num_train_epochs)
