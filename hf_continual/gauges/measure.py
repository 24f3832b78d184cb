"""Loss, exact match and KL of rows, from one forward pass each; logits exist only for the predicted tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_continual.gauges.probe import ProbeRow
from hf_continual.tensors.head import base_head, finish_of, plain_model
from hf_continual.tensors.reference import as_reference

# Tokens whose logits are converted to float32 at the same time.
CHUNK = 64
COLUMNS = ("nll", "tokens", "exact", "kl")


class Base:
    """The base model's predictions: its last hidden states for the predicted tokens, on the CPU, and its head.

    Memory: tokens x hidden size, plus one copy of the head if the head is trained.

    Args:
        model: The model; adapters are switched off while the base is recorded, a model without adapters is its own
            base.
    """

    def __init__(self, model: Any) -> None:
        self.hidden: dict[tuple[int, ...], Tensor] = {}
        head = plain_model(model).get_output_embeddings()
        inner = base_head(model)
        self.finish = finish_of(model)
        kept = [p for p in (inner.weight, getattr(inner, "bias", None)) if p is not None]
        self.head: Any = inner
        if inner is head and any(p.requires_grad for p in kept):
            self.head = tuple(p.detach().to("cpu", copy=True) for p in kept)

    def logits(self, hidden_ND: Tensor, device: torch.device) -> Tensor:
        """Logits (N, V) of the base from its hidden states."""
        if isinstance(self.head, tuple):
            weights = [p.to(device) for p in self.head]
            return self.finish(linear(hidden_ND.to(device, weights[0].dtype), *weights))
        return self.finish(self.head(hidden_ND.to(device)))


def chosen(
    model: Any, rows: Sequence[ProbeRow], device: torch.device, pad: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run one forward pass whose head gets only the hidden states before predicted tokens.

    Args:
        model: A causal language model, with or without adapters, in evaluation mode.
        rows: The rows of the batch.
        device: Device of the inputs.
        pad: A padding token.

    Returns:
        Logits (N, V) and hidden states (N, D) before each predicted token, the tokens (N), and their row (N).

    Raises:
        RuntimeError: If the head was not called, as in compiled code.
    """
    width = max(len(row.ids) for row in rows)
    ids_BS = torch.tensor([[*row.ids, *[pad] * (width - len(row.ids))] for row in rows], device=device)
    mask_BS = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows], device=device)
    filled = [[*row.predicted, *[False] * (width - len(row.ids))] for row in rows]
    where_BS = torch.tensor(filled, device=device)[:, 1:]
    seen: list[Tensor] = []

    def only_predicted(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # Prompt learning prepends virtual tokens, so the row's own are the last ones.
        hidden_BSD = args[0][:, -width:][:, :-1]
        seen.append(hidden_BSD[where_BS.to(hidden_BSD.device)])
        return (seen[-1][None], *args[1:])

    hook = plain_model(model).get_output_embeddings().register_forward_pre_hook(only_predicted)
    try:
        logits_NV = model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False).logits[0]
    finally:
        hook.remove()
    if not seen:
        raise RuntimeError(
            "The head's hook was not called, as happens in compiled code. Drop torch_compile, or gauges."
        )
    row_N = torch.arange(len(rows), device=device)[:, None].expand_as(where_BS)[where_BS]
    return logits_NV, seen[-1], ids_BS[:, 1:][where_BS], row_N


def record(
    model: Any, rows: Sequence[ProbeRow], batch: Sequence[int], base: Base, device: torch.device, pad: int
) -> None:
    """Keep the base's hidden states of a batch."""
    with as_reference(model, "base"):
        _, hidden_ND, _, _ = chosen(model, [rows[i] for i in batch], device, pad)
    base.hidden[tuple(batch)] = hidden_ND.cpu()


def measured(
    model: Any, rows: Sequence[ProbeRow], batch: Sequence[int], base: Base | None, device: torch.device, pad: int
) -> Tensor:
    """Measure each row of a batch.

    Args:
        model: The model in evaluation mode.
        rows: All rows of the gauge.
        batch: Indices of the rows to measure.
        base: The base's predictions, for the KL; None leaves it 0.
        device: Device to compute on.
        pad: A padding token.

    Returns:
        Per row of the batch the columns of `COLUMNS`, float64: summed negative log-likelihood in nats, predicted tokens,
        whether all of them are the most likely ones, summed KL(base || model) in nats; shape (B, 4).
    """
    logits_NV, _, target_N, row_N = chosen(model, [rows[i] for i in batch], device, pad)
    found = torch.zeros(len(batch), len(COLUMNS), device=device, dtype=torch.float64)
    wrong = torch.zeros(len(batch), device=device, dtype=torch.float64)
    hidden_ND = None if base is None else base.hidden[tuple(batch)]
    for start in range(0, len(target_N), CHUNK):
        part = slice(start, start + CHUNK)
        logp = torch.log_softmax(logits_NV[part].float(), -1)
        target, row = target_N[part], row_N[part]
        found[:, 0].index_add_(0, row, -logp.gather(-1, target[:, None])[:, 0].double())
        found[:, 1].index_add_(0, row, torch.ones_like(row, dtype=torch.float64))
        wrong.index_add_(0, row, (logp.argmax(-1) != target).double())
        if base is not None and hidden_ND is not None:
            found[:, 3].index_add_(0, row, divergence(base.logits(hidden_ND[part], device), logp))
    found[:, 2] = (wrong == 0).double()
    return found


def divergence(base_NV: Tensor, logp_NV: Tensor) -> Tensor:
    """Forward KL of the base's prediction from the model's, sum_v p (log p - log q), in nats; shape (N), float64.

    Args:
        base_NV: Logits of the base.
        logp_NV: Log-probabilities of the model, float32.

    Returns:
        One value for each of the N tokens, 0 where both agree.
    """
    base_NV = torch.log_softmax(base_NV.float(), -1)
    return (base_NV.exp() * (base_NV - logp_NV)).sum(-1, dtype=torch.float64)
