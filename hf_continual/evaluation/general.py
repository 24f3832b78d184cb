"""How well a model still predicts text that has nothing to do with its tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hf_continual.ends import padding_token
from hf_continual.evaluation.prompts import NOT_NUMBERS, batches_by_length, evaluating
from hf_continual.evaluation.questions import check_lengths
from hf_continual.evaluation.result import RowScore, Scored

if TYPE_CHECKING:
    from datasets import Dataset


def general_loss(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str] | Dataset,
    max_length: int = 512,
    batch_size: int = 8,
) -> Scored:
    """Negative log-likelihood per token of general text, in nats; its exponential is the perplexity.

    Args:
        model: A causal language model; its training mode is restored.
        tokenizer: Its tokenizer.
        texts: Texts that were not trained on, or rows with a column `text`.
        max_length: Maximum number of tokens per text.
        batch_size: Texts per forward pass.

    Returns:
        A loss per text, weighted by its predicted tokens. Texts are tokenized by calling the tokenizer, as in training; the
        first token of a text is not predicted.

    Raises:
        ValueError: If rows have no column `text`, texts are longer than the model's table of positions, or its
            logits are not numbers.
    """
    if not isinstance(texts, Sequence):
        if "text" not in texts.column_names:
            raise ValueError(f"general text needs a column 'text', but the rows have {texts.column_names}.")
        texts = texts["text"][:]
    encoded = [tokenizer(text)["input_ids"][:max_length] for text in texts]
    check_lengths(model, [len(ids) for ids in encoded])
    found = {i: RowScore(0.0, 0.0) for i, ids in enumerate(encoded) if len(ids) < 2}
    long = [i for i, ids in enumerate(encoded) if len(ids) > 1]
    pad = padding_token(tokenizer)
    with evaluating(model) as device:
        for picked in batches_by_length(long, [len(encoded[i]) for i in long], batch_size):
            batch = [encoded[long[k]] for k in picked]
            width = max(map(len, batch))
            ids = torch.tensor([x + [pad] * (width - len(x)) for x in batch], device=device)
            mask = torch.tensor([[1] * len(x) + [0] * (width - len(x)) for x in batch], device=device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            logits = logits[:, -width:][:, :-1].float()  # a soft prompt comes before the text
            nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            sums = torch.where(mask[:, 1:].bool(), nll.view(len(batch), -1), 0.0).sum(1).tolist()
            if any(math.isnan(total) for total in sums):
                raise ValueError(NOT_NUMBERS)
            for k, x, total in zip(picked, batch, sums, strict=True):
                found[long[k]] = RowScore(total / (len(x) - 1), len(x) - 1)
    return Scored([found[i] for i in range(len(encoded))], "NLL per token of general text", lower_is_better=True)
