"""Everything that a method may see of a run and call on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """The part of a method that a run uses."""

    @property
    def name(self) -> str:
        """The name under which its rows are kept."""


class Run(Protocol):
    """Everything that a method may ask of the trainer."""

    @property
    def model(self) -> nn.Module:
        """The model without wrappers such as DDP's; PEFT stays."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the run."""

    @property
    def task(self) -> Task:
        """The task being learned; its index is 0 outside a sequence."""

    @property
    def step(self) -> int:
        """Optimizer steps done so far."""

    @property
    def max_steps(self) -> int:
        """Total optimizer steps of this run; 0 before training starts."""

    @property
    def extra_updates(self) -> int:
        """Total updates of the run's optimizer that methods make on top of its steps, see `Method.extra_updates`."""

    @property
    def learning_rate(self) -> float:
        """Peak learning rate of the run; if groups differ, that of the optimizer's default or largest group."""

    @property
    def starts_afresh(self) -> bool:
        """Whether the run should start without what an earlier task left (`ContinualConfig.fresh_methods`)."""

    @property
    def seed(self) -> int:
        """Seed for a method's random draws; it must use its own generator."""

    @property
    def max_length(self) -> int | None:
        """Number of tokens to which the trainer truncates rows, or None if it does not."""

    @property
    def device(self) -> torch.device:
        """Device of the batches."""

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the run, without accelerate's wrapper."""

    @property
    def output_dir(self) -> Path | None:
        """Folder of the run's checkpoints."""

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
        """`lr`, `betas`, `eps` and `weight_decay` from the training arguments."""

    @property
    def place(self) -> tuple[int, int]:
        """Number of processes, and which one this is."""

    def log(self, values: Mapping[str, float]) -> None:
        """Log values at once, at the current step, to every logger of the trainer."""

    def measures(self) -> dict[str, Tensor]:
        """What the run's methods measure of themselves, see `Method.measure`, by ``method/name``."""

    def weights_replaced(self) -> None:
        """Tell every method that earlier weights were put back, see `Method.weights_replaced`."""

    def stop(self, reason: str) -> None:
        """End training after this step, as finished; the reason is kept."""

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are sharded over processes (FSDP, ZeRO)."""

    def named_parameters(self) -> dict[str, Parameter]:
        """Trainable parameters by their name in the unwrapped model."""

    @property
    def task_rows(self) -> Dataset:
        """The task's own rows as trained: `input_ids` and `labels`; a row's index is its id.

        Rows that were packed also have `seq_lengths`, the tokens of each row within.

        Raises ValueError for streamed rows, which have no end and no order that can be read twice.
        """

    def passes(
        self, rows: Dataset, batch_rows: int | None = None, alone: bool = False, what: str = ""
    ) -> Iterator[tuple[list[Batch], int]]:
        """One pass over tokenised rows in order, with a progress bar: this process's micro-batches of each batch of
        `batch_rows` rows over all processes (None: of an optimizer step), and the batch's total number of rows.

        With `alone`, each process gets its own batches, and some may get more than others.
        """

    def rows(self, method: Named) -> Dataset:
        """The replay rows of a method, tokenised, in the order that `Forward.row_BS` indexes."""

    def prepare(self, rows: Dataset, row_type: str = "same", name: str = "method") -> Dataset:
        """Tokenise rows as the task's rows were; `name` is the caller, for messages."""

    def batches(self, rows: Dataset, batch_size: int | None = None) -> Iterator[Batch]:
        """Collated batches of tokenised rows on the device, in order; `batch_size` as in `micro_batches`."""

    def micro_batches(self, rows: Dataset, step: int, batch_size: int | None = None) -> list[Batch]:
        """This process's micro-batches of the `step`-th optimizer step over tokenised rows, reshuffled each pass.

        A pure function of the run's seed and `step`; two processes use the same rows as one with twice the
        accumulation. Where `auto_find_batch_size` has lowered the task's batches, a `batch_size` is lowered by the same
        factor.
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
        clips as a step does; `training=False` leaves dropout out; `alone` uses this process's batches only.
        Returns the loss before `scale`, without gradient.
        """

    def update(self, change: Callable[[], None] | None = None) -> bool:
        """Step the trainer's optimizer with the gradients as they are, or call `change` instead.

        Returns False if the gradient scaler found an overflow: then nothing was changed.
        """

    def zero_grad(self) -> None:
        """Clear the gradients."""

    def note(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Log the mean ``total / count`` over the logged steps and all processes."""

    def optimizer_step(self) -> None:
        """Clip, step the trainer's optimizer and zero the gradients; the schedule does not advance."""

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over the processes."""

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a tensor over the processes."""

    @property
    def autocast_dtype(self) -> str | None:
        """The lower precision of the forward passes, ``"bf16"`` or ``"fp16"``, or None."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute inside the context like the training's forward passes."""
