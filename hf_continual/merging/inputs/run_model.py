"""Texts of the new task as token ids, and models' representations of them: one model loaded at a time."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_continual.evaluation.prompts import decoder, evaluating
from hf_continual.merging.inputs.dequantization import put_into
from hf_continual.merging.inputs.members import Member
from hf_continual.merging.inputs.tokenizer_files import tokenizer_folder
from hf_continual.tensors.layers import find_blocks

logger = logging.getLogger(__name__)

SHORTEST = 2  # tokens; one token is nearly the same for every text


@dataclass(frozen=True)
class Setting:
    """How models are run for their representations.

    Args:
        device: Device, or None: the accelerator if there is one.
        dtype: dtype of the weights, or None: the checkpoint's, but bfloat16 or float32 on a CPU, never float16.
        low_memory: Whether blocks are read from disk as needed.
    """

    device: str | None = None
    dtype: str | None = None
    low_memory: bool = False


def token_ids(calibration: Any, tokenizer: Any, pool_size: int, max_length: int) -> tuple[list[list[int]], list[int]]:
    """Turn texts, conversations or prompt-completion rows into token ids, as they were trained on.

    Args:
        calibration: Texts, or rows with ``text``, ``messages``, or ``prompt`` and ``completion``.
        tokenizer: The newest model's.
        pool_size: Upper limit on texts, evenly spaced.
        max_length: Tokens per text.

    Returns:
        Ids of the texts with two tokens or more, and their places in `calibration`.

    Raises:
        ValueError: If there is no such text.
        TypeError: If a row has an unknown form.
    """
    if isinstance(calibration, str):
        raise TypeError(f"calibration={calibration!r} is one text; give a list of texts or rows of the new task.")
    number = len(calibration)
    if number == 0:
        raise ValueError("calibration is empty. Give texts of the newest model's task, or calibration_mode='self'.")
    places = sorted({i * number // min(pool_size, number) for i in range(min(pool_size, number))})
    ids = [_encode(calibration[i], tokenizer)[:max_length] for i in places]
    kept = [(tokens, i) for tokens, i in zip(ids, places, strict=True) if len(tokens) >= SHORTEST]
    if not kept:
        raise ValueError(
            f"all {len(ids)} calibration texts have fewer than {SHORTEST} tokens. Give whole texts of the newest model's task."
        )
    return [tokens for tokens, _ in kept], [i for _, i in kept]


def _encode(row: Any, tokenizer: Any) -> list[int]:
    if isinstance(row, str):
        return list(tokenizer(row)["input_ids"])
    if "input_ids" in row:
        return list(row["input_ids"])
    if "text" in row:
        return list(tokenizer(row["text"])["input_ids"])
    messages = row.get("messages")
    if messages is None and "prompt" in row:
        if isinstance(row["prompt"], str):
            return list(tokenizer(row["prompt"] + row["completion"])["input_ids"])
        messages = [*row["prompt"], *row["completion"]]
    if messages is None:
        raise TypeError(
            f"a calibration row has the columns {', '.join(map(repr, row))}; it needs 'text', 'messages', or 'prompt' and "
            f"'completion', or to be a text itself."
        )
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])


def load_tokenizer(member: Member) -> Any:
    """The tokenizer of a model, from its own folder or the base's."""
    return AutoTokenizer.from_pretrained(tokenizer_folder(member))


@contextmanager
def loaded(member: Member, setting: Setting) -> Iterator[Any]:
    """Load a model for the duration of the ``with``.

    Args:
        member: Full model, or base with adapter.
        setting: Where and how.

    Yields:
        The model, in evaluation mode.
    """
    device = setting.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, setting.dtype) if setting.dtype else _own_dtype(member, device)
    with tempfile.TemporaryDirectory() as offload:
        placed: dict[str, Any] = {"device_map": {"": "disk"}, "offload_folder": offload} if setting.low_memory else {}
        model = AutoModelForCausalLM.from_pretrained(member.checkpoint.folder, dtype=dtype, **placed)
        if member.checkpoint.seen_as is not None:
            put_into(model, member.checkpoint)
        if member.adapter is not None:
            model = PeftModel.from_pretrained(model, member.adapter.checkpoint.folder)
        try:
            yield (model if setting.low_memory else model.to(device)).eval()
        finally:
            del model
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _own_dtype(member: Member, device: str) -> torch.dtype:
    stored = {t.dtype for t in member.checkpoint.tensors.values() if t.is_float}
    if not stored & {"F16", "BF16"}:
        return torch.float32
    # float16 matrix products on a CPU take minutes where the others take a second.
    return torch.float16 if "F16" in stored and device != "cpu" else torch.bfloat16


def representations(model: Any, texts: Sequence[Sequence[int]], batch_size: int = 1) -> np.ndarray:
    """The mean hidden state over tokens for every group: before the first block, after each, after the final norm.

    Blocks are read with forward hooks: transformers' last hidden state is after the final norm.

    Args:
        model: A causal language model, with or without an adapter.
        texts: Token ids.
        batch_size: Texts per forward pass; 1 needs no padding, so a text's numbers do not depend on its neighbours.

    Returns:
        ``[G, K, D]``, float32.
    """
    blocks = find_blocks(model)
    body, _ = decoder(model)
    sums: list[torch.Tensor] = []
    mask = torch.ones(1, 1, 1)

    def keep(hidden: Any) -> None:
        hidden_BSD = hidden[0] if isinstance(hidden, tuple) else hidden
        pooled = (hidden_BSD.float() * mask.to(hidden_BSD.device)).sum(1) / mask.sum(1).to(hidden_BSD.device)
        sums.append(pooled.cpu())

    def entering(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(args[0] if args else kwargs["hidden_states"])

    hooks = [blocks.modules[0].register_forward_pre_hook(entering, with_kwargs=True)]
    hooks += [block.register_forward_hook(lambda *a: keep(a[2])) for block in blocks.modules]
    found = []
    try:
        with evaluating(model) as device:
            device = torch.device("cpu") if device.type == "meta" else device
            for start in range(0, len(texts), batch_size):
                batch = texts[start : start + batch_size]
                width = max(map(len, batch))
                ids = torch.tensor([[*t, *[t[-1]] * (width - len(t))] for t in batch], device=device)
                seen = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in batch], device=device)
                mask = seen[:, :, None].float()
                sums.clear()
                out = body(input_ids=ids, attention_mask=seen, use_cache=False)
                keep(out.last_hidden_state)
                found.append(torch.stack(sums))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(found, dim=1).numpy()


def cached_representations(
    member: Member, texts: Sequence[Sequence[int]], setting: Setting, folder: Path
) -> np.ndarray:
    """`representations` of a model, cached until the merge is published, so that a killed calibration resumes.

    Args:
        member: The model.
        texts: Token ids.
        setting: How it is run.
        folder: Where they are cached.

    Returns:
        ``[G, K, D]``, float32.
    """
    named = [
        member.checkpoint.fingerprint,
        member.checkpoint.seen_as,
        member.own.fingerprint,
        repr(setting),
        [list(t) for t in texts],
    ]
    key = hashlib.sha256(json.dumps(named).encode()).hexdigest()[:32]
    file = folder / f"{key}.npy"
    if file.is_file():
        return np.load(file)
    logger.info("%s: representations of %d texts", member.name, len(texts))
    with loaded(member, setting) as model:
        found = representations(model, texts, len(texts) if setting.low_memory else 1)
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}")
    with partial.open("wb") as written:
        np.save(written, found)
    partial.replace(file)
    return found
