"""Gates of a mixture of experts, and the terms that keep experts in use and apart; see `hf_continual.methods.moe_lora`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["balance_loss", "contrastive_loss", "task_gate", "token_gate"]


def task_gate(gate_EK: Tensor, embedding_K: Tensor) -> Tensor:
    """Weight of each expert by the task, softmax(W_g t).

    Args:
        gate_EK: W_g.
        embedding_K: t, (K,); or of each row of a batch, (B, K).

    Returns:
        (E,), or (B, E).
    """
    return functional.linear(embedding_K.float(), gate_EK.float()).softmax(-1)


def token_gate(router_ED: Tensor, x: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight of each expert by the token, its top k of softmax(W_r x) scaled to the sum 1.

    Args:
        router_ED: W_r.
        x: Input of the layer, (..., D).
        top_k: Experts that a token uses.

    Returns:
        Weights, probabilities before the choice, and which were chosen (bool); each (..., E).
    """
    # Not under autocast: near a tie, rounding would choose another expert at inference than in training.
    with torch.autocast(x.device.type, enabled=False):
        probabilities = functional.linear(x.float(), router_ED.float()).softmax(-1)
    top = probabilities.topk(top_k, dim=-1)
    chosen = torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, top.indices, True)
    kept = probabilities * chosen
    return kept / (kept.sum(-1, keepdim=True) + 1e-8), probabilities, chosen


def balance_loss(probabilities_NE: Tensor, chosen_NE: Tensor, mask_N: Tensor | None = None) -> Tensor:
    """E sum_e f_e P_e: f_e the share of tokens that chose expert e (of all k choices), P_e its mean probability.

    k where the choice is even, up to E where every token chooses alike.

    Args:
        probabilities_NE: Before the choice.
        chosen_NE: True for the experts that a token uses.
        mask_N: Tokens that count; None counts all.

    Returns:
        Scalar; gradients reach the probabilities.
    """
    weights_N1 = torch.ones_like(probabilities_NE[:, :1]) if mask_N is None else mask_N.to(probabilities_NE)[:, None]
    count = weights_N1.sum().clamp(min=1)
    f_E, P_E = ((t.to(weights_N1) * weights_N1).sum(0) / count for t in (chosen_NE, probabilities_NE))
    return probabilities_NE.shape[1] * (f_E * P_E).sum()


def contrastive_loss(outputs_NEO: Tensor, temperature: float = 0.07, mask_N: Tensor | None = None) -> Tensor:
    """InfoNCE between the outputs of experts: those of one expert are alike, those of different experts are not.

    For an output of expert e the positives are the outputs of e for other tokens, the negatives all outputs of other experts:
    ``-mean log(exp(s_p / temperature) / sum exp(s / temperature))`` with cosines s.

    Args:
        outputs_NEO: B_e A_e x of N tokens.
        temperature: Of the similarities.
        mask_N: Tokens that count; None counts all.

    Returns:
        Scalar of at least 0.
    """
    count, experts, _ = outputs_NEO.shape
    flat = outputs_NEO.float().flatten(0, 1)
    flat = flat * torch.rsqrt(flat.square().sum(-1, keepdim=True) + 1e-4)  # B begins at 0
    expert = torch.arange(experts, device=flat.device).repeat(count)
    real = torch.ones(count, dtype=torch.bool, device=flat.device) if mask_N is None else mask_N.bool()
    real = real.repeat_interleave(experts)
    others = real[:, None] & real & ~torch.eye(len(flat), dtype=torch.bool, device=flat.device)
    positives = others & (expert[:, None] == expert)
    similarity = (flat @ flat.T / temperature).masked_fill(~others, -torch.finfo(torch.float32).max)
    log_share = similarity - similarity.logsumexp(1, keepdim=True)
    return -(log_share * positives).sum() / positives.sum().clamp(min=1)
