"""Estimate how long a run takes: train one and two blocks of its model, with random weights, briefly on this machine.

The time of a micro-batch grows linearly with the blocks, so two small measurements give the total: no weights are
loaded and little memory is needed.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import PartialState
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from hf_continual.stream.models import adapter_to_add
from hf_continual.stream.prepare import Prepared

logger = logging.getLogger(__name__)

ROUNDS = 3


def estimate(prepared: Prepared, described: Mapping[str, Any], hourly_price: float | None = None) -> dict[str, Any]:
    """Time and price of a run, measured on this machine.

    Loading, saving and generation are not included, so it is a lower bound for runs that are scored by generation.

    Args:
        prepared: The prepared plan.
        described: What `describe` returned for it.
        hourly_price: Price of an hour of this machine, or None.

    Returns:
        ``seconds`` (None if the probe failed, with ``why``), ``training_seconds``, ``scoring_seconds``,
        ``seconds_per_micro_batch``, ``device`` and ``price``.
    """
    widest = max((task["micro_batch"] for task in described["tasks"]), key=lambda m: m["tokens"])
    rows = max(widest["task_rows"] + widest["added_rows"], 1)
    width = max(widest["tokens"] // rows, 2)
    checkpointing = any(task["gradient_checkpointing"] for task in described["tasks"])
    try:
        train, update, forward, blocks = _times(prepared, rows, width, checkpointing)
    except Exception as error:  # an estimate must never stop a dry run; the reason is shown
        logger.debug("the probe failed", exc_info=True)
        return {"seconds": None, "why": f"{type(error).__name__}: {error}"}
    per_batch = _at(train, blocks)
    training = 0.0
    for task in described["tasks"]:
        steps = task["steps"] + task["extra_steps"]
        fill = min(1.0, task["tokens"] / max(task["rows"], 1) / width * (1 + task["replay_share"]))
        training += steps * (task["accumulation"] * per_batch * fill + _at(update, blocks))
    scoring = _at(forward, blocks) * described["scored_rows"] / rows
    seconds = training + scoring
    return {
        "seconds": seconds, "training_seconds": training, "scoring_seconds": scoring, "seconds_per_micro_batch": per_batch,
        "device": str(PartialState().device), "price": None if hourly_price is None else seconds / 3600 * hourly_price,
    }  # fmt: skip


def _at(measured: tuple[float, float], blocks: int) -> float:
    """Time with all blocks, from the times with one and with two."""
    one, two = measured
    return max(one + (two - one) * (blocks - 1), one)


Pair = tuple[float, float]


def _times(prepared: Prepared, rows: int, width: int, checkpointing: bool) -> tuple[Pair, Pair, Pair, int]:
    """Seconds of a training micro-batch, an update and a forward pass, each with one and two blocks; and the number of blocks."""
    plan = prepared.plan
    config: Any = AutoConfig.from_pretrained(plan.model.path, revision=plan.model.revision)
    dtype = getattr(torch, "float32" if plan.model.dtype == "auto" else plan.model.dtype)
    blocks = config.num_hidden_layers
    train, update, forward = [], [], []
    for number in (1, 2):
        small = copy.deepcopy(config)
        small.num_hidden_layers = number
        for name in ("layer_types", "no_rope_layers"):
            if isinstance(listed := getattr(small, name, None), list):
                setattr(small, name, listed[:number])
        model: Any = AutoModelForCausalLM.from_config(small, dtype=dtype).to(PartialState().device)
        if (adapter := adapter_to_add(plan, prepared.methods(prepared.stream[0]))) is not None:
            model = get_peft_model(model, adapter)
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
        inputs = torch.randint(0, config.vocab_size, (rows, width), device=PartialState().device)
        train.append(_fastest(lambda model=model, inputs=inputs: _step(model, inputs)))
        update.append(_fastest(optimizer.step))
        model.eval()
        with torch.no_grad():
            forward.append(_fastest(lambda model=model, inputs=inputs: model(input_ids=inputs)))
        del model, optimizer
    return (train[0], train[1]), (update[0], update[1]), (forward[0], forward[1]), blocks


def _step(model: Any, inputs: torch.Tensor) -> None:
    model.train()
    model.zero_grad()
    model(input_ids=inputs, labels=inputs).loss.backward()


def _fastest(call: Any) -> float:
    """Seconds of the fastest of a few rounds, after one warm-up round."""
    call()
    best = math.inf
    for _ in range(ROUNDS):
        _wait()
        begin = time.perf_counter()
        call()
        _wait()
        best = min(best, time.perf_counter() - begin)
    return best


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
