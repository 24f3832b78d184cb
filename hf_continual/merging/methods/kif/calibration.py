"""Importance of a finished model's weights: one gradient per batch of rows, averaged as `KIF` does in training.

The model is in memory with its gradients and two float32 values per scored weight: unlike the fusion, this is not memory-bounded.
It runs in evaluation mode; gradients are clipped to norm 1, like those that the paper's code measures importance with.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file

from hf_continual.atomic_files import read_json, write_json
from hf_continual.evaluation.trained import trained_tokens
from hf_continual.merging.errors import MergeError
from hf_continual.merging.inputs.adapter import Adapter
from hf_continual.merging.inputs.checkpoint import open_checkpoint
from hf_continual.merging.inputs.members import Member
from hf_continual.merging.inputs.run_model import Setting, load_tokenizer, loaded
from hf_continual.merging.methods.kif.scores import Scores, Side, read_scores, stored_name
from hf_continual.tensors.importance import Order, update_importance_

logger = logging.getLogger(__name__)

IGNORED = -100
MAX_NORM = 1.0
SEED = 0  # for shuffling rows: averages favour the last ones, and files are often sorted by class

Encoded = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Measure:
    """How importance is measured; the fields are those of `hf_continual.kif_fuse`."""

    beta1: float
    beta2: float
    order: Order
    batch_size: int
    max_length: int


def member_to_run(member: Member, base_model: str | os.PathLike[str] | None) -> Member:
    """Make a model loadable: an adapter together with the full model that it belongs to.

    Args:
        member: A full model or an adapter.
        base_model: The full model, or None to use the one that the adapter's configuration names.

    Returns:
        The model.

    Raises:
        ValueError: If the full model cannot be found, or is not a full model.
    """
    adapter = member.checkpoint
    if not adapter.is_adapter:
        return member
    named: Any = base_model or adapter.config.get("base_model_name_or_path")
    way = "Give base_model=, the full model that the adapters were trained on; calibration runs it."
    if not named:
        raise ValueError(f"{adapter.name} does not say which model it was trained on. {way}")
    try:
        full = open_checkpoint(named)
    except FileNotFoundError as error:
        raise ValueError(f"the base of {adapter.name} ({named!r}) was not found: {error} {way}") from error
    if full.is_adapter:
        raise ValueError(f"base_model={str(named)!r} is an adapter. {way}")
    return Member(full, Adapter(adapter, {}, {}, {}))


def calibrated(
    side: Side,
    member: Member,
    names: Sequence[str],
    rows: Dataset,
    measure: Measure,
    setting: Setting,
    folder: Path,
    uncertainty: bool | None,
) -> Scores:
    """Measure the importance of a model's weights on rows; kept in a file until the merge is published, so that a kill loses nothing.

    Args:
        side: Which side it is for.
        member: The model, or base and adapter.
        names: Stored names of the weights that get scores.
        rows: Rows with text, messages, prompt and completion, or token ids.
        measure: How it is measured.
        setting: The device and dtype that the model runs in.
        folder: Where the file goes.
        uncertainty: See `read_scores`.

    Returns:
        The scores.

    Raises:
        MergeError: If weights are not found in the loaded model, or no batch has a finite gradient.
        ValueError: If no row has a token to train on.
    """
    tokens = encoded_rows(rows, load_tokenizer(member), measure.max_length)
    rows_sha256 = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
    told = [member.checkpoint.fingerprint, member.own.fingerprint, rows_sha256, asdict(measure), repr(setting)]
    key = hashlib.sha256(json.dumps([told, sorted(names)]).encode()).hexdigest()[:32]
    file = folder / f"{key}.safetensors"
    if not file.is_file():
        logger.info("%s: importance of %d tensors on %d rows", member.name, len(names), len(tokens))
        averages, facts = _measured(member, names, tokens, measure, setting)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file.with_suffix(".json"), facts)
        partial = file.with_name(f".{file.name}")
        save_file(averages, partial)
        partial.replace(file)
    found = read_scores(file, side, uncertainty)
    known = {k: v for k, v in found.facts.items() if k in ("score",)}
    facts = {
        "from": "calibration", **known, "model": member.name, "rows_sha256": rows_sha256, **asdict(measure),
        "max_norm": MAX_NORM, "seed": SEED, **read_json(file.with_suffix(".json")),
    }  # fmt: skip
    return Scores(found.tensors, found.averages, facts)


def encoded_rows(rows: Dataset, tokenizer: Any, max_length: int) -> list[Encoded]:
    """Token ids and labels of rows, as in training: only the answer if there is a prompt, else all tokens.

    Args:
        rows: Rows with ``prompt`` and ``completion``, ``messages``, ``text``, or ``input_ids`` (and ``labels``).
        tokenizer: The model's.
        max_length: Tokens per row; a prompt is cut at its beginning, a text at its end.

    Returns:
        Ids and labels of the rows that have a token to train on.

    Raises:
        ValueError: If there is no such row.
        TypeError: If a row has an unknown form.
    """
    found = [_encoded(dict(row), tokenizer, max_length) for row in rows]  # pyrefly: ignore[bad-argument-type]
    kept = [(ids, labels) for ids, labels in found if any(label != IGNORED for label in labels[1:])]
    if not kept:
        raise ValueError(
            f"none of the {len(found)} calibration rows has a token to train on. Give whole rows of the task."
        )
    return kept


def _encoded(row: dict[str, Any], tokenizer: Any, max_length: int) -> Encoded:
    if "input_ids" in row:
        ids = list(row["input_ids"])
        return ids[:max_length], list(row.get("labels") or ids)[:max_length]
    if "prompt" in row:
        prompt, answer = trained_tokens(row, tokenizer)
        return [*prompt, *answer][-max_length:], [*[IGNORED] * len(prompt), *answer][-max_length:]
    if row.get("messages") is not None:
        ids = list(tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True)["input_ids"])
    elif row.get("text") is not None:
        ids = list(tokenizer(row["text"])["input_ids"])
        ids += [tokenizer.eos_token_id] * (tokenizer.eos_token_id not in ids[-1:])
    else:
        raise TypeError(
            f"a calibration row has the columns {', '.join(map(repr, row))}; it needs 'text', 'messages', 'prompt' and "
            f"'completion', or 'input_ids'."
        )
    return ids[:max_length], ids[:max_length]


def _batches(tokens: Sequence[Encoded], size: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(SEED)).tolist()
    for start in range(0, len(order), size):
        batch = [tokens[i] for i in order[start : start + size]]
        width = max(len(ids) for ids, _ in batch)
        padded = {
            "input_ids": [ids + [0] * (width - len(ids)) for ids, _ in batch],
            "attention_mask": [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch],
            "labels": [labels + [IGNORED] * (width - len(labels)) for _, labels in batch],
        }
        yield {name: torch.tensor(rows, device=device) for name, rows in padded.items()}


def _trained(model: Any, member: Member, names: Sequence[str]) -> dict[str, torch.nn.Parameter]:
    """The parameters that get scores, by stored names; gradients are switched off for the others."""
    params = {}
    for parameter, p in model.named_parameters():
        name = stored_name(parameter)
        p.requires_grad_(name in names)
        if name in names:
            params[name] = p
    if missing := set(names) - params.keys():
        raise MergeError(
            f"{member.name}, once loaded, has no parameters {', '.join(sorted(missing)[:5])} ({len(missing)} of "
            f"{len(names)}): its architecture renames weights on loading, so their gradients cannot be matched. Give "
            f"importance= by stored names."
        )
    return params


def _measured(
    member: Member, names: Sequence[str], tokens: Sequence[Encoded], measure: Measure, setting: Setting
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with loaded(member, setting) as model:
        params = _trained(model, member, names)
        device = next(iter(params.values())).device
        averages = {n: [torch.zeros(p.shape, device=device) for _ in range(2)] for n, p in params.items()}
        batches = left_out = 0
        for batch in _batches(tokens, measure.batch_size, device):
            model.zero_grad(set_to_none=True)
            model(**batch).loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(params.values(), MAX_NORM)
            batches += 1
            if not bool(torch.isfinite(norm)):
                left_out += 1
                continue
            for name, p in params.items():
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                kept, spread = averages[name]
                update_importance_(kept, spread, p.detach(), grad, measure.beta1, measure.beta2, measure.order)
        model.zero_grad(set_to_none=True)
    if left_out == batches:
        raise MergeError(f"{member.name}: the gradients of all {batches} batches are not finite. The model is broken.")
    if left_out:
        logger.warning("%s: %d batches had gradients that were not finite; they were skipped.", member.name, left_out)
    written = {}
    for name, (importance, spread) in averages.items():
        written |= {f"importance/{name}": importance.cpu(), f"uncertainty/{name}": spread.cpu()}
    return written, {"rows": len(tokens), "batches": batches, "left_out": left_out}
