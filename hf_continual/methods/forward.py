"""A method's view of a forward pass, and the rows that it adds to one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

TASK, PADDING = -1, -100


@dataclass(frozen=True)
class Forward:
    """One micro-batch after its single forward pass, all with its graph.

    Attributes:
        inputs: The model's arguments (`input_ids`, `labels`, `attention_mask` or positions).
        token_loss_BS: Loss of predicting token t + 1 at position t, zero where the label is ignored;
            shape (B, S - 1).
        taps: Outputs of the modules named in `Method.taps`, by that name.
        source_BS: Where each token comes from: -1 the task, k the k-th replay source, -100 padding. Virtual tokens of
            prompt learning precede each row as padding, here and in all other shapes.
        row_BS: Index of the token's row within its replay source; for a task token, and for a row paired with it, within
            `Run.task_rows`, if a method asks for it (`Method.reads_row_ids`), otherwise -1; -1 for padding.
        offset_BS: Position of the token within that row; -1 where `row_BS` is -1.
        sources: Names of the replay sources; `source_BS` indexes this tuple.
        tokens: Number of (weighted) loss tokens of the whole optimizer step over all processes, by
            which the trainer divides the summed token loss.
        drawn: ``(source, row, tokens)`` of each replay row in this micro-batch, in the order of its tokens; on the
            host, so that a method can look up what it keeps per row without waiting for the accelerator.
        task_drawn: ``(row, tokens)`` of each of the task's rows in this micro-batch, likewise on the host; only if a method asks
            for row ids.
        entropy_BS: Entropy in nats of the prediction at position t, without gradient; shape (B, S - 1).
        notes: See `note`.
        scale: Factor that turns a sum of token losses over `tokens` into the unit of a
            loss term (processes, accumulation steps).
    """

    inputs: Mapping[str, Tensor]
    token_loss_BS: Tensor
    taps: Mapping[str, Tensor]
    source_BS: Tensor
    row_BS: Tensor
    offset_BS: Tensor
    sources: tuple[str, ...]
    tokens: Tensor
    scale: float
    drawn: Sequence[tuple[int, int, int]] = ()
    task_drawn: Sequence[tuple[int, int]] = ()
    entropy_BS: Tensor | None = None
    notes: dict[str, tuple[Tensor | float, Tensor | float]] = field(default_factory=dict)

    def note(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Log a value that is not a loss term, under the method's name: the mean ``total / count`` over the steps."""
        self.notes[name] = (total, count)

    def mask(self, source: str | None = None) -> Tensor:
        """Tokens of a replay source, or of the task for None; bool of shape (B, S)."""
        return self.source_BS == (TASK if source is None else self.sources.index(source))

    def label_mask(self, source: str | None = None) -> Tensor:
        """Positions of `token_loss_BS` that predict a token of this source; bool of shape (B, S - 1)."""
        return self.mask(source)[:, 1:] & (self.inputs["labels"][:, 1:] != PADDING)

    def token_mean(self, values_BS: Tensor) -> Tensor:
        """Reduce per-token values exactly like the trainer reduces the token loss.

        A term made with it does not depend on how tokens are split over micro-batches and processes.

        Args:
            values_BS: One value per position of `token_loss_BS`, zero where it must not count.

        Returns:
            Scalar whose contribution to the step's loss is ``values.sum() / tokens``.
        """
        return values_BS.sum() / self.tokens * self.scale


@dataclass(frozen=True)
class AddedRows:
    """Rows that a method mixes into each micro-batch, as given by its hyper-parameters.

    Args:
        ratio: Their fraction of the tokens of the mix, or None.
        per_batch: Their number in each micro-batch of each process, or None.
        weight: Weight of each of their tokens in the loss.
        max_length: Number of tokens to which the method truncates such a row, or None.
        paired: Number of rows that join each row of the task, of about its length.
    """

    ratio: float | None = None
    per_batch: int | None = None
    weight: float = 1.0
    max_length: int | None = None
    paired: int = 0
