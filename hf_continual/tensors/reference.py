"""A model as a reference: its weights without adapters, told apart by a fingerprint, read by its last hidden states."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from hf_continual.tensors.anchors import fingerprint

Reference = Literal["base", "task_start"]


@contextlib.contextmanager
def as_reference(model: nn.Module, reference: Reference) -> Iterator[None]:
    """Evaluation mode without gradients; for the base also without adapters. Modes are restored.

    Args:
        model: The unwrapped model.
        reference: ``"base"`` without adapters, ``"task_start"`` as it is.

    Yields:
        None: While the model is the reference.
    """
    training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        with torch.no_grad(), contextlib.ExitStack() as stack:
            if reference == "base" and isinstance(model, PeftModel):
                stack.enter_context(model.disable_adapter())
            yield
    finally:
        for name, module in model.named_modules():
            module.training = training[name]


def weights_fingerprint(model: nn.Module, reference: Reference) -> str:
    """Hash of the weights that the reference computes with; the same with and without adapters for ``"base"``."""
    tensors = {}
    for name, tensor in model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if reference == "task_start" or not _of_adapter(name):
            tensors[plain] = tensor
    return fingerprint(tensors)


def _of_adapter(name: str) -> bool:
    return any(part in name for part in ("lora_", ".modules_to_save.", ".trainable_tokens_"))


def numerics(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """What else the last hidden states depend on: type of the weights, attention, tokenizer."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    vocabulary = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]
    return {
        "model": type(base).__name__,
        "dtype": str(next(p.dtype for p in base.parameters() if p.is_floating_point())),
        "attention": base.config._attn_implementation,
        "quantised": bool(getattr(base, "is_quantized", False)),
        "tokenizer": vocabulary,
    }


def last_hidden(model: nn.Module, tokens: Sequence[int]) -> Tensor:
    """Last hidden states (S, D) of one row, without padding, in the model's own type."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    device = base.get_input_embeddings().weight.device
    ids = torch.tensor([list(tokens)], device=device)
    return base.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
