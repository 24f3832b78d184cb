"""The recovery test: a short training on shown rows, and what it does to rows that are not shown.

Zheng et al. (ICLR 2025, section 3.2) train one epoch on half of the old task. Here it is a few steps of AdamW with a linear
schedule, the same for AFTER and for the control, on the answers' tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from hf_continual.ends import padding_token
from hf_continual.evaluation.prompts import decoder
from hf_continual.evaluation.questions import Question, read_questions
from hf_continual.progress import over

WARMUP = 0.1  # of the steps


def teach(
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int = 0,
    look: Callable[[int], None] | None = None,
    look_at: Sequence[int] = (),
) -> None:
    """Train what requires gradients (an adapter, or all weights) on the answers of rows.

    Costs `steps` forward and backward passes, and AdamW's two moments per trained weight.

    Args:
        model: A causal language model in fp32; left in evaluation mode.
        tokenizer: Its tokenizer.
        rows: Rows with prompt and answer.
        steps: Optimizer steps.
        learning_rate: Highest rate, after a tenth of the steps; it falls to 0.
        batch_size: Rows per step.
        seed: Seed of the order.
        look: Called with the number of steps done.
        look_at: When.
    """
    questions = read_questions(model, tokenizer, rows)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, learning_rate, weight_decay=0.0)
    warm = max(round(WARMUP * steps), 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(steps - warm, 1), 1.0)
    )
    pad, order = padding_token(tokenizer), _batches(len(questions), batch_size, seed)
    for step in over(range(1, steps + 1), "short training", " steps"):
        model.train()
        _loss(model, [questions[i] for i in next(order)], pad).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if look is not None and step in look_at:
            look(step)
    model.eval()


def _batches(number: int, size: int, seed: int) -> Iterator[list[int]]:
    """Rows in an order that is shuffled for every pass over them."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(number, generator=generator).tolist()
        yield waiting[:size]
        waiting = waiting[size:]


def _loss(model: Any, batch: Sequence[Question], pad: int) -> Tensor:
    """Mean NLL of the answers' tokens; only their positions go through the head."""
    body, head = decoder(model)
    width = max(len(q.prompt) + len(q.answer) for q in batch)
    ids_BS = torch.full((len(batch), width), pad)
    mask_BS = torch.zeros_like(ids_BS)
    for i, q in enumerate(batch):
        size = len(q.prompt) + len(q.answer)
        ids_BS[i, :size] = torch.tensor([*q.prompt, *q.answer])
        mask_BS[i, :size] = 1
    device = next(model.parameters()).device
    hidden_BSD = body(input_ids=ids_BS.to(device), attention_mask=mask_BS.to(device), use_cache=False).last_hidden_state
    states = [hidden_BSD[i, len(q.prompt) - 1 : len(q.prompt) + len(q.answer) - 1] for i, q in enumerate(batch)]
    gold = torch.tensor([token for q in batch for token in q.answer], device=device)
    return torch.nn.functional.cross_entropy(head(torch.cat(states)).float(), gold)
