"""A model as a reference: its weights without adapters, their fingerprint, and its last hidden states."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from hf_continual.private import attention_of
from hf_continual.tensors.anchors import fingerprint
from hf_continual.tensors.head import head_differs, plain_model
from hf_continual.tensors.modes import evaluation_mode

Reference = Literal["base", "task_start"]

# Keys of a configuration that hidden states do not depend on, and that loading and saving a model may change.
_IDLE = re.compile(
    r"^_|token_id$|^output_|^(transformers_version|architectures|dtype|torch_dtype|use_cache|return_dict|id2label|label2id"
    r"|problem_type|initializer_range|quantization_config|vocab_size|pretraining_tp|chunk_size_feed_forward)$"
)


@contextlib.contextmanager
def as_reference(model: nn.Module, reference: Reference) -> Iterator[None]:
    """Evaluation mode without gradients; for the base also without adapters. Everything it changes is restored.

    Args:
        model: The unwrapped model.
        reference: ``"base"`` without adapters, ``"task_start"`` as it is.

    Yields:
        None: While the model is the reference.
    """
    # PEFT makes all active adapters trainable when they are switched on again, including those that were frozen.
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with evaluation_mode(model), torch.no_grad(), contextlib.ExitStack() as stack:
            if reference == "base" and isinstance(model, PeftModel):
                stack.enter_context(model.disable_adapter())
            yield
    finally:
        for parameter, wanted in trainable:
            parameter.requires_grad_(wanted)


def weights_fingerprint(model: nn.Module, reference: Reference) -> str:
    """Hash of the weights that the reference computes with; the same with and without adapters for ``"base"``.

    Args:
        model: The unwrapped model.
        reference: ``"base"`` leaves adapters out.

    Returns:
        64 hexadecimal digits; an empty string if this process does not hold the weights (FSDP loads them once).

    Raises:
        ValueError: If the weights are already sharded over processes, as under DeepSpeed ZeRO-3.
    """
    tensors: dict[str, Tensor] = {}
    prefix = getattr(model.base_model, "prefix", "lora_") if isinstance(model, PeftModel) else "lora_"
    wrapped = "base_model." if plain_model(model) is getattr(model, "base_model", None) else "base_model.model."
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            return ""
        if not tensor.numel():
            raise ValueError(
                f"{name} is empty on this process: DeepSpeed ZeRO-3 sharded the weights before the reference could be "
                f"read. Use ZeRO-2 or FSDP2, or drop the method that needs a reference."
            )
        plain = name.removeprefix(wrapped)
        for wrapper in (".base_layer.", ".original_module."):
            plain = plain.replace(wrapper, ".")
        if reference == "task_start" or not _of_adapter(name, prefix):
            tensors[plain] = tensor
            # The codes of a quantised weight do not include its scale.
            scales = getattr(getattr(tensor, "quant_state", None), "absmax", None)
            if isinstance(scales, Tensor):
                tensors[f"{plain}.absmax"] = scales
    return fingerprint(tensors)


def untrained(model: nn.Module) -> bool:
    """Whether no adapter has learned anything yet: everything learned is then in the weights."""
    learned = [p for name, p in model.named_parameters() if "lora_B." in name or "lora_embedding_B." in name]
    if not isinstance(model, PeftModel):
        return True
    return bool(learned) and not any(bool(p.detach().count_nonzero()) for p in learned)


def _of_adapter(name: str, prefix: str) -> bool:
    if name.startswith("prompt_encoder."):
        return True
    return any(part in name for part in ("lora_", prefix, ".modules_to_save.", ".trainable_tokens_"))


def numerics(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """Other inputs of the last hidden states: configuration, dtype of the weights, attention, tokenizer."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    vocabulary = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]
    shape = {k: v for k, v in base.config.to_dict().items() if v is not None and not _IDLE.search(k)}
    return {
        "model": type(base).__name__,
        "config": hashlib.sha256(repr(sorted(shape.items(), key=str)).encode()).hexdigest()[:16],
        "dtype": str(next(p.dtype for p in base.parameters() if p.is_floating_point())),
        "attention": attention_of(base.config),
        "quantised": bool(getattr(base, "is_quantized", False)),
        "tokenizer": vocabulary,
    }


def last_hidden(model: nn.Module, tokens: Sequence[int]) -> Tensor:
    """Last hidden states (S, D) of one row, without padding, in the model's own dtype.

    Virtual tokens of prompt learning precede the row, as in training; their states are left out.
    """
    base: Any = plain_model(model)
    device = base.get_input_embeddings().weight.device
    ids = torch.tensor([list(tokens)], device=device)
    if not virtual_tokens(model):
        return base.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    seen: list[Tensor] = []
    handle = base.base_model.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state))
    try:
        own_logits(model, tokens)  # only PEFT's own forward puts its tokens in front of a row
    finally:
        handle.remove()
    return seen[0][0, -len(tokens) :]


def own_logits(model: nn.Module, tokens: Sequence[int]) -> Tensor:
    """Logits (S, V) of one row from the model's own forward, without those of virtual tokens."""
    ids = torch.tensor([list(tokens)], device=plain_model(model).get_input_embeddings().weight.device)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(tokens) :]


def check_head(model: nn.Module, reference: Reference, tokens: Sequence[int], sharded: bool) -> None:
    """Refuse a model whose logits cannot be computed from its last hidden states.

    Args:
        model: The unwrapped model.
        reference: The reference to compare with.
        tokens: A row to try it with.
        sharded: Whether the head is sharded over processes.

    Raises:
        ValueError: If it is, or if the model has an unknown step between these states and its logits.
    """
    if sharded:
        raise ValueError(
            "GeRe(constraint='kl') needs the whole language-model head; under FSDP use 'tm', 'l1' or 'l2'."
        )
    with as_reference(model, reference):
        problem = head_differs(model, last_hidden(model, tokens), own_logits(model, tokens))
    if problem:
        raise ValueError(f"GeRe(constraint='kl'): {problem}. Use 'tm', 'l1' or 'l2', which need no logits.")


def virtual_tokens(model: nn.Module) -> int:
    """Tokens that prompt learning (prompt tuning, p-tuning, prefix tuning) puts in front of every row."""
    config: Any = getattr(model, "active_peft_config", None)
    return int(config.num_virtual_tokens or 0) if getattr(config, "is_prompt_learning", False) else 0


def tokens_in_front(model: Any) -> int:
    """Positions that an adapter takes in front of every row, whether the model's outputs show them or not."""
    hidden = getattr(getattr(model, "active_peft_config", None), "tokens_in_front", 0)
    return virtual_tokens(model) + int(hidden)


def learned_positions(model: nn.Module) -> bool:
    """Whether positions are rows of a table (GPT-2, OPT), which has a last one."""
    base: Any = plain_model(model)
    most, tokens = getattr(base.config.get_text_config(), "max_position_embeddings", None), base.get_input_embeddings()
    tables = [m for m in base.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    return isinstance(most, int) and any(0 <= table.num_embeddings - most <= 2 for table in tables)


def most_tokens(model: nn.Module) -> int | None:
    """Maximum number of tokens of a row, or None if the configuration sets no limit."""
    config = getattr(plain_model(model), "config", None)
    positions = getattr(config and config.get_text_config(), "max_position_embeddings", None)
    return None if not isinstance(positions, int) or positions < 1 else positions - tokens_in_front(model)
