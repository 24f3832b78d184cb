"""All that a method may see of a run, and ask of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    import torch
    from datasets import Dataset
    from torch import Tensor, nn
    from torch.nn import Parameter
    from torch.optim import Optimizer
    from transformers import PreTrainedTokenizerBase

    from hf_continual.tasks import Task

Batch = dict[str, Any]


class Named(Protocol):
    """A method, as far as a run must know it."""

    @property
    def name(self) -> str:
        """Under which its rows are kept."""


class Run(Protocol):
    """All that a method may ask of the trainer."""

    @property
    def model(self) -> nn.Module:
        """The model without the wrappers of DDP and the like; PEFT stays."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the run."""

    @property
    def task(self) -> Task:
        """The task being learnt; its index is 0 outside a sequence."""

    @property
    def step(self) -> int:
        """Optimizer steps done so far."""

    @property
    def max_steps(self) -> int:
        """Optimizer steps of this run in all; 0 before training starts."""

    @property
    def extra_updates(self) -> int:
        """Updates of the run's optimizer in all that methods make on top of its steps, see `Method.extra_updates`."""

    @property
    def learning_rate(self) -> float:
        """Peak learning rate of the run; where parameter groups differ, of the optimizer's default or largest group."""

    @property
    def starts_afresh(self) -> bool:
        """Whether the run was told to start without what an earlier task left (`ContinualConfig.fresh_methods`)."""

    @property
    def seed(self) -> int:
        """Seed for whatever a method draws; it must use a generator of its own."""

    @property
    def max_length(self) -> int | None:
        """Tokens of a row at which the trainer cuts, or None where it cuts none."""

    @property
    def device(self) -> torch.device:
        """Where batches live."""

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the run, without accelerate's wrapper."""

    @property
    def output_dir(self) -> Path | None:
        """Where the run writes its checkpoints."""

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the files."""

    @property
    def schedule(self) -> float:
        """The factor of the schedule: the current learning rate of the same group over its peak."""

    @property
    def batch_size(self) -> int:
        """Rows of a micro-batch of the task, as lowered by `auto_find_batch_size`."""

    def optimizer_defaults(self) -> dict[str, Any]:
        """`lr`, `betas`, `eps` and `weight_decay` as the training arguments have them."""

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are spread over processes (FSDP, ZeRO)."""

    def named_parameters(self) -> dict[str, Parameter]:
        """Trainable parameters by the name they have in the unwrapped model."""

    @property
    def task_rows(self) -> Dataset:
        """The task's own rows as they are trained: `input_ids` and `labels`; a row's place is its id.

        Rows that were packed also have `seq_lengths`, the tokens of each row within.

        Raises ValueError for streamed rows, which have no end and no order that can be read twice.
        """

    def passes(
        self, rows: Dataset, batch_rows: int | None = None, alone: bool = False, what: str = ""
    ) -> Iterator[tuple[list[Batch], int]]:
        """One pass over tokenised rows in order, with a progress bar: this process's micro-batches of each batch of
        `batch_rows` rows over all processes (None: of an optimizer step), and how many rows the batch has in all.

        With `alone`, each process gets batches of its own, and not all get equally many.
        """

    def rows(self, method: Named) -> Dataset:
        """The replay rows of a method, tokenised, in the order that `Forward.row_BS` indexes."""

    def prepare(self, rows: Dataset, row_type: str = "same", name: str = "method") -> Dataset:
        """Tokenise rows as the task's rows were; `name` is who asks, for messages."""

    def batches(self, rows: Dataset, batch_size: int | None = None) -> Iterator[Batch]:
        """Collated batches of tokenised rows on the device, in order; `batch_size` as in `micro_batches`."""

    def micro_batches(self, rows: Dataset, step: int, batch_size: int | None = None) -> list[Batch]:
        """This process's micro-batches of the `step`-th optimizer step over tokenised rows, shuffled anew each pass.

        A pure function of the run's seed and `step`; two processes take what one with twice the accumulation takes.
        Where `auto_find_batch_size` has lowered the task's batches, a `batch_size` is lowered by the same share.
        """

    def loss(self, batch: Batch) -> Tensor:
        """Token-mean SFT loss of one batch through the wrapped model; not counted in the metrics."""

    def backward(self, loss: Tensor) -> None:
        """Backward through the trainer's scaler and hooks."""

    def gradients(
        self,
        batches: Sequence[Batch],
        scale: float = 1.0,
        clip: bool = True,
        training: bool = True,
        alone: bool = False,
    ) -> Tensor:
        """Leave the gradient of micro-batches in `.grad`, reduced over processes and unscaled.

        The loss is the trainer's own with its normalisation, times `scale`; metrics and methods do not see it. `clip`
        clips as a step does; `training=False` leaves dropout out; `alone` takes this process's batches for the whole.
        Returns the loss before `scale`, without gradient.
        """

    def update(self, change: Callable[[], None] | None = None) -> bool:
        """Step the trainer's optimizer with the gradients as they are, or call `change` in its place.

        False where a gradient scaler met an overflow: then nothing was changed.
        """

    def zero_grad(self) -> None:
        """Clear the gradients."""

    def note(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Log the mean ``total / count`` over the logged steps and all processes."""

    def optimizer_step(self) -> None:
        """Clip, step the trainer's optimizer and zero the gradients; the schedule does not move."""

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over the processes."""

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a tensor over the processes."""

    @property
    def autocast_dtype(self) -> str | None:
        """The lower precision that forward passes are computed in, ``"bf16"`` or ``"fp16"``, or None."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute inside as the training's forward passes do."""
