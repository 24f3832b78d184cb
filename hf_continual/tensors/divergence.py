r"""KL of a model's predictions from a base's, token by token, with the logits of a few tokens at a time.

With p the prediction of the base, q that of the model, and K the k likeliest tokens of the base:

    KL = sum_v p_v log(p_v / q_v)                                                  over the whole vocabulary
    KL_k = sum_{v in K} p_v log(p_v / q_v) + p_r log(p_r / q_r)                    all other tokens are one, p_r = 1 - sum_K p_v

KL_k is 0 where both agree, at most KL (merging outcomes loses information), and equals it at k = V or where p and q are
proportional outside K. Its gradient leaves the proportions among the other tokens free.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

TILE = 256  # tokens whose logits exist at once
GONE = -1e30  # logit of a token that is left out; finite, so that a sum over none has a gradient


def top_of(logits_NV: Tensor, k: int) -> Tensor:
    """The base's k likeliest tokens, their log-probabilities, and that of all others together.

    Args:
        logits_NV: The base's logits, float32.
        k: Number of tokens to keep; all, if there are fewer.

    Returns:
        int32 of shape (N, 2 k + 1): ids, then the bits of float32 numbers in nats, see `opened`.
    """
    k = min(k, logits_NV.shape[-1])
    total_N1 = torch.logsumexp(logits_NV, -1, keepdim=True)
    top_Nk, ids_Nk = logits_NV.topk(k, dim=-1)
    rest_N1 = torch.logsumexp(logits_NV.scatter(-1, ids_Nk, GONE), -1, keepdim=True)
    numbers = torch.cat([top_Nk, rest_N1], -1).float() - total_N1
    return torch.cat([ids_Nk.to(torch.int32), numbers.contiguous().view(torch.int32)], -1)


def opened(kept_NK: Tensor) -> tuple[Tensor, Tensor]:
    """What `top_of` packed.

    Args:
        kept_NK: int32 of shape (N, 2 k + 1).

    Returns:
        ids (N, k) int64, and log-probabilities (N, k + 1), the last of all other tokens.
    """
    k = kept_NK.shape[-1] // 2
    return kept_NK[:, :k].long(), kept_NK[:, k:].contiguous().view(torch.float32)


def truncated_divergence(hidden_TD: Tensor, head: Callable[[Tensor], Tensor], kept_TK: Tensor) -> Tensor:
    """KL_k of a model from what `top_of` kept of a base, of each token.

    Args:
        hidden_TD: Last hidden states of the model that predict the tokens.
        head: Logits of hidden states (`logits_function`).
        kept_TK: int32 of shape (T, 2 k + 1).

    Returns:
        Nats, (T), float32. Logits exist for 256 tokens at a time, and again in the backward pass.
    """

    def tile(z: Tensor, kept: Tensor) -> Tensor:
        logits_NV = head(z).float()
        ids_Nk, logp = opened(kept.to(logits_NV.device))
        total_N1 = torch.logsumexp(logits_NV, -1, keepdim=True)
        rest_N1 = torch.logsumexp(logits_NV.scatter(-1, ids_Nk, GONE), -1, keepdim=True)
        logq = torch.cat([logits_NV.gather(-1, ids_Nk), rest_N1], -1) - total_N1
        return (logp.exp() * (logp - logq)).sum(-1)

    return _tiled(tile, hidden_TD, kept_TK)


def full_divergence(
    hidden_TD: Tensor, head: Callable[[Tensor], Tensor], base_TD: Tensor, base_head: Callable[[Tensor], Tensor]
) -> Tensor:
    """KL over the whole vocabulary, of each token; arguments and memory as in `truncated_divergence`.

    Args:
        hidden_TD: Last hidden states of the model.
        head: Logits of them.
        base_TD: Last hidden states of the base.
        base_head: Logits of them.

    Returns:
        Nats, (T), float32.
    """

    def tile(z: Tensor, base: Tensor) -> Tensor:
        logq_NV = torch.log_softmax(head(z).float(), -1)
        with torch.no_grad():
            logp_NV = torch.log_softmax(base_head(base).float(), -1).to(logq_NV.device)
        return (logp_NV.exp() * (logp_NV - logq_NV)).sum(-1)

    return _tiled(tile, hidden_TD, base_TD)


def _tiled(tile: Callable[[Tensor, Tensor], Tensor], one: Tensor, other: Tensor) -> Tensor:
    parts = zip(one.split(TILE), other.split(TILE), strict=True)
    return torch.cat([checkpoint(tile, a, b, use_reentrant=False).to(one.device) for a, b in parts])  # pyrefly: ignore
