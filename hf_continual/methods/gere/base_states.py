"""Find the base that states belong to, even if only fine-tuned weights are available."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_continual.data.distributed import from_first
from hf_continual.data.recording import DIGITS, facts_of, put_back, taken_out
from hf_continual.methods.base import Forward, Run
from hf_continual.methods.gere.states import States, open_recorded, open_whole
from hf_continual.tensors.head import finish_of, head_bias, logits_function, recorded_logits
from hf_continual.tensors.reference import Reference, numerics, untrained, virtual_tokens

CARRIED = "recorded/"  # prefix of tensors that are saved with the model


def base_of(run: Run, left: Mapping[str, Any], weights: str) -> str:
    """Fingerprint of the base that weights come from: left by the previous task, or their own.

    Args:
        run: The run.
        left: What GeRe left in the previous task; empty if there was none.
        weights: Fingerprint of the current weights, without adapters.

    Returns:
        The fingerprint.

    Raises:
        ValueError: If the weights are those of an earlier task, which did not record their base.
    """
    if (base := left.get("weights")) is not None:
        return str(base)
    if run.task.index > 0 and untrained(run.model) and not run.starts_afresh:
        raise ValueError(
            f"GeRe(reference='base'): task {run.task.name!r} (index {run.task.index}) starts from fine-tuned weights, and no "
            f"GeRe of an earlier task recorded the base they come from. Start from a folder that a run with GeRe saved "
            f"(ContinualTrainer(model=folder) or ContinualConfig(predecessor=folder)); or use reference='task_start'; or "
            f"take the current weights as the base: ContinualConfig(fresh_methods=True)."
        )
    return weights


def facts_for(
    run: Run, tokens: Sequence[Sequence[int]], reference: Reference, keep_hidden: bool, head: bool, **numbers: float
) -> dict[str, Any]:
    """Everything that states depend on, except the weights.

    Args:
        run: The run.
        tokens: The general rows.
        reference: Which model they are recorded from.
        keep_hidden: Whether hidden states are kept.
        head: Whether the language-model head is kept with them.
        **numbers: Hyper-parameters they depend on.

    Returns:
        Plain data.
    """
    facts: dict[str, Any] = {
        "texts": hashlib.sha256(repr(tokens).encode()).hexdigest(), **numbers,
        "what": "hidden" if keep_hidden else "states", "head": head, "layer": "last_hidden_state", "version": 2,
        "autocast": run.autocast_dtype, **numerics(run.model, run.tokenizer),
    }  # fmt: skip
    if head and head_bias(run.model) is not None:
        facts["head_bias"] = True
    if reference == "task_start" and (virtual := virtual_tokens(run.model)):
        facts["virtual_tokens"] = virtual
    return facts


def recorded_before(file: Path, facts: dict[str, Any], left: Mapping[str, Any]) -> States:
    """States of a base that is not available: from the cache, or as saved with the model.

    Args:
        file: Their file in the cache.
        facts: The facts they must have been made for.
        left: What GeRe left in the previous task.

    Returns:
        The open file.

    Raises:
        ValueError: If they are in neither.
    """
    tensors = {k.removeprefix(CARRIED): t for k, t in left.items() if k.startswith(CARRIED)}
    then = left.get("facts") or {}
    if from_first(lambda: open_recorded(file, facts)) is None:
        if not tensors or then != facts:
            other = ", ".join(k for k in facts if then and then.get(k) != facts[k])
            why = f"the model came with states for other {other}" if other else "the model came without any"
            raise ValueError(
                f"GeRe(reference='base'): the states of the base (weights {facts['weights'][:DIGITS]}) are not complete in {file}, "
                f"{why}, and the base is not available to record them. Give the same rows, tokenizer and options as in the first "
                f"task, or its cache_dir; or use reference='task_start'."
            )
        put_back(file, facts, tensors)
    return open_whole(file)


def left_for(base: str, states: States | None) -> dict[str, Any]:
    """State for a later task: the base's fingerprint, and its states if they can no longer be recorded."""
    found: dict[str, Any] = {"weights": base}
    if states is not None:
        found["facts"] = facts_of(states.file)
        found |= {f"{CARRIED}{name}": t for name, t in taken_out(states.file).items()}
    return found


def check_same_states(states: States, then: Mapping[str, Tensor]) -> None:
    """Refuse to resume with states that were recorded from other weights.

    Args:
        states: The run's states.
        then: Thresholds of the states it began with.

    Raises:
        ValueError: If they differ.
    """
    width = (then["high"] - then["low"]).abs() + 1e-6
    if float(((states.low_D - then["low"]).abs() / width).max()) > 1e-3:
        raise ValueError(
            f"GeRe: {states.file} holds states of different weights than the ones that the run to resume began with. "
            f"Build the trainer with the same model as before, not with a checkpoint of it."
        )


def heads(run: Run, states: States) -> tuple[Any, Any]:
    """Functions from hidden states to logits: the model's head as it is now, and the recorded one."""
    names = ["head"] if head_bias(run.model) is None else ["head", "head_bias"]
    kept = (states.tensor(name).to(run.device) for name in names)
    return logits_function(run.model), recorded_logits(*kept, finish=finish_of(run.model))


def side_by_side(
    forward: Forward, name: str, states: States, drawn: Sequence[tuple[int, int]], packed: bool
) -> tuple[Tensor, Tensor]:
    """Hidden states of a micro-batch's general tokens, and the recorded values for them.

    Args:
        forward: The micro-batch.
        name: Source name of the general rows.
        states: The recorded states.
        drawn: Row and number of tokens of each general row, in the order of their tokens.
        packed: Whether to return states instead of hidden states.

    Returns:
        ``(hidden_TD, kept)``, kept of shape (T, bytes) or (T, D), on the device of the first.
    """
    tokens = sum(length for _, length in drawn)
    where = torch.nonzero_static(forward.mask(name).flatten(), size=tokens).squeeze(1)
    hidden_TD = forward.taps["last_hidden_state"].flatten(0, 1).index_select(0, where)
    kept = torch.cat([states.row(row, length, "states" if packed else "hidden") for row, length in drawn])
    return hidden_TD, kept.to(hidden_TD.device, non_blocking=True)
