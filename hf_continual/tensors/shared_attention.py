"""Attention of a row over the keys of tasks, and the loss that holds it; see `hf_continual.methods.sapt_lora`."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional

__all__ = ["attention", "pooled", "query", "reflection_loss"]


def pooled(embeddings_BSD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """Largest value of each channel over the tokens of a row, (B, D), without gradient.

    Args:
        embeddings_BSD: Input embeddings.
        mask_BS: Tokens that count, at least one in each row; None counts all (the authors count padding too).

    Returns:
        (B, D), float32.
    """
    x_BSD = embeddings_BSD.detach().float()
    if mask_BS is not None:
        x_BSD = x_BSD.masked_fill(~mask_BS.bool()[..., None], -math.inf)
    return x_BSD.amax(1)


def query(pooled_BD: Tensor, down_HD: Tensor, up_DH: Tensor, weight_D: Tensor, bias_D: Tensor) -> Tensor:
    """LayerNorm(SiLU(W_2 W_1 x)).

    Args:
        pooled_BD: See `pooled`.
        down_HD: W_1.
        up_DH: W_2.
        weight_D: Of the layer norm.
        bias_D: Of the layer norm.

    Returns:
        (B, D).
    """
    hidden_BD = functional.silu(functional.linear(functional.linear(pooled_BD, down_HD), up_DH))
    return functional.layer_norm(hidden_BD, hidden_BD.shape[-1:], weight_D, bias_D)


def attention(query_BD: Tensor, keys_TD: Tensor) -> Tensor:
    """Weight of each task's pair, softmax(K q / sqrt(D)), (B, T)."""
    return (query_BD @ keys_TD.T / math.sqrt(query_BD.shape[-1])).softmax(-1)


def reflection_loss(weights_BT: Tensor, label_T: Tensor) -> Tensor:
    """KL(label || w), mean over the rows: how far the attention of an earlier task's rows has moved.

    Args:
        weights_BT: Attention as it is now.
        label_T: Mean attention when the task was learned, 0 for the tasks after it.

    Returns:
        Scalar of at least 0.
    """
    return functional.kl_div(weights_BT.clamp(min=1e-12).log(), label_T.expand_as(weights_BT), reduction="batchmean")
