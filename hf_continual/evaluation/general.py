"""How well a model still predicts text that has nothing to do with its tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_continual.evaluation.result import Score, mean_of


@torch.inference_mode()
def general_loss(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    max_length: int = 512,
    batch_size: int = 8,
) -> Score:
    """Negative log-likelihood per token of general text, in nats; its exponential is the perplexity.

    Args:
        model: A causal language model; its training mode is restored.
        tokenizer: Its tokenizer.
        texts: Texts that were not trained on.
        max_length: Tokens read of each text.
        batch_size: Texts per forward pass.

    Returns:
        Mean over all predicted tokens, which are `n`; the standard error is over texts.
    """
    training, device = model.training, model.get_input_embeddings().weight.device
    model.eval()
    sums: list[float] = []
    counts: list[int] = []
    encoded = [tokenizer(text)["input_ids"][:max_length] for text in texts]
    for start in range(0, len(encoded), batch_size):
        batch = [ids for ids in encoded[start : start + batch_size] if len(ids) > 1]
        width = max(map(len, batch))
        ids = torch.tensor([x + [tokenizer.eos_token_id] * (width - len(x)) for x in batch], device=device)
        mask = torch.tensor([[1] * len(x) + [0] * (width - len(x)) for x in batch], device=device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        nll = nll.view(len(batch), -1) * mask[:, 1:]
        sums += nll.sum(1).tolist()
        counts += mask[:, 1:].sum(1).tolist()
    model.train(training)
    per_text = mean_of([s / c for s, c in zip(sums, counts, strict=True)], "")
    return Score(sum(sums) / sum(counts), sum(counts), "NLL per token of general text", per_text.standard_error)
