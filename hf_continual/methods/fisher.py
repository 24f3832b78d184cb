r"""The diagonal Fisher information of weights, measured on rows; used by EWC and, optionally, RecAdam.

Kirkpatrick et al., PNAS 2017, https://arxiv.org/abs/1612.00796, where F is the mean square of the gradient of log p:

    F = 1/N sum_b n_b (grad L_b)^2      "batch": over batches of n_b rows, L_b the token mean of the batch
    F = 1/N sum_n (grad L_n)^2          "sample": over single rows, as in the definition; about n_b times as large

Both are empirical: the labels are those of the rows, not drawn from the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from hf_continual.methods.run import Run
from hf_continual.tensors.flat import local

__all__ = ["FisherKind", "add_squares_", "fisher_diagonal", "measure_fisher"]

FisherKind = Literal["batch", "sample"]


@torch.no_grad()
def add_squares_(fisher: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None], rows: int) -> None:
    """Add ``rows * gradient^2`` to F in place; a weight without a gradient adds nothing."""
    held = [(fisher[n], g.to(fisher[n].dtype)) for n, g in gradients.items() if g is not None and n in fisher]
    if held:
        sums, found = [list(column) for column in zip(*held, strict=True)]
        torch._foreach_addcmul_(sums, found, found, value=rows)


def fisher_diagonal(losses: Iterable[Tensor], params: Mapping[str, Tensor], rows: Iterable[int]) -> dict[str, Tensor]:
    """F from losses: ``1/N sum_b n_b (grad L_b)^2``; with ``n_b = 1`` it is the definition, over single rows.

    Args:
        losses: Scalars with their graphs, one for each batch or row; may be computed lazily.
        params: Weights by name, which the losses depend on.
        rows: n_b, the number of rows in each.

    Returns:
        F by name, float32, of the shapes of `params`.

    Raises:
        ValueError: If there are no losses, or their number differs from that of `rows`.
    """
    fisher = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in params.items()}
    total = 0
    for loss, count in zip(losses, rows, strict=True):
        found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        add_squares_(fisher, dict(zip(params, found, strict=True)), count)
        total += count
    if not total:
        raise ValueError("there are no losses, and the Fisher information needs at least one row.")
    return {name: f.div_(total) for name, f in fisher.items()}


def measure_fisher(
    run: Run,
    rows: Any,
    kind: FisherKind,
    most: int | None = None,
    batch_rows: int | None = None,
    what: str = "Fisher",
) -> tuple[dict[str, Tensor], int]:
    """F of all trainable weights on tokenised rows: one forward and backward pass without dropout.

    Args:
        run: The run, with everything wrapped.
        rows: Tokenised rows, a Dataset.
        kind: ``"batch"`` or ``"sample"``.
        most: Rows to draw with the run's seed; None: all.
        batch_rows: Rows of a batch over all processes; None: as many as an optimizer step.
        what: Title of the progress bar.

    Returns:
        F by name, float32 and sharded like the weights, and the number of rows.

    Raises:
        ValueError: If single rows are requested and the weights are sharded over processes.
    """
    single = kind == "sample"
    if single and run.is_sharded:
        raise ValueError(
            f"{what}: fisher='sample' needs the gradient of one row on one process, and the weights are sharded over "
            f"processes. Use fisher='batch'."
        )
    if most is not None and most < len(rows):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(run.seed))
        rows = rows.select(order[:most].tolist())
    params = run.named_parameters()
    fisher = {n: torch.zeros_like(p.detach(), dtype=torch.float32) for n, p in params.items()}
    parts = {n: local(t) for n, t in fisher.items()}
    for batches, counted in run.passes(rows, 1 if single else batch_rows, alone=single, what=what):
        run.gradients(batches, clip=False, training=False, alone=single)
        add_squares_(parts, {n: None if p.grad is None else local(p.grad) for n, p in params.items()}, counted)
        run.zero_grad()
    if single:
        fisher = {name: run.sum(f) for name, f in fisher.items()}
    return {name: f.div_(len(rows)) for name, f in fisher.items()}, len(rows)
