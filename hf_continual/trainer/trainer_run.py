"""TrainerRun: the part of the trainer that a method sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import Trainer

from hf_continual import private
from hf_continual.data.replay import shuffled
from hf_continual.data.rows import digest_of
from hf_continual.methods.run import Batch, Named
from hf_continual.trainer import checks, extra_gradients
from hf_continual.trainer.collating import check_collates
from hf_continual.trainer.rates import peak_and_factor

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.nn import Parameter
    from torch.optim import Optimizer
    from transformers import PreTrainedTokenizerBase

    from hf_continual.tasks import Task
    from hf_continual.trainer.live import LiveTrainer

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


class TrainerRun:
    """Implements `hf_continual.methods.base.Run` over any trainer with methods; documented there."""

    def __init__(self, trainer: LiveTrainer, task: Task) -> None:
        self._trainer = trainer
        self.task = task

    @property
    def model(self) -> nn.Module:
        return self._trainer.accelerator.unwrap_model(self._trainer.model, keep_torch_compile=False)  # pyrefly: ignore[bad-return]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return private.tokenizer_of(self._trainer)

    @property
    def step(self) -> int:
        return self._trainer.state.global_step

    @property
    def max_steps(self) -> int:
        return max(self._trainer.state.max_steps, 0)

    @property
    def extra_updates(self) -> int:
        return sum(method.extra_updates(self.max_steps) for method in self._trainer.methods)

    @property
    def learning_rate(self) -> float:
        return self._peak_and_factor()[0]

    @property
    def starts_afresh(self) -> bool:
        return bool(getattr(self._trainer.options, "fresh_methods", False))

    @property
    def seed(self) -> int:
        args = self._trainer.args
        return args.seed if args.data_seed is None else args.data_seed

    @property
    def max_length(self) -> int | None:
        return getattr(self._trainer.args, "max_length", None)

    @property
    def device(self) -> torch.device:
        return self._trainer.args.device

    @property
    def optimizer(self) -> Optimizer:
        optimizer = self._trainer.optimizer
        if optimizer is None:
            raise RuntimeError("The optimizer does not exist before training starts; ask for it in begin_task.")
        # accelerate's wrapper keeps the real one in `.optimizer`; before `prepare` there is no wrapper.
        return getattr(optimizer, "optimizer", optimizer)

    @property
    def place(self) -> tuple[int, int]:
        return self._trainer.args.world_size, self._trainer.args.process_index

    def log(self, values: Mapping[str, float]) -> None:
        # Not the trainer's own: SFTTrainer and the ledger would end the means that the next log is made of.
        control = self._trainer.control
        asked = control.should_log
        Trainer.log(self._trainer, dict(values))
        control.should_log = asked  # a log that is due at this step comes all the same

    def measures(self) -> dict[str, Tensor]:
        return {f"{m.name}/{k}": v for m in self._trainer.methods for k, v in m.measure(self).items()}

    def weights_replaced(self) -> None:
        for method in self._trainer.methods:
            method.weights_replaced(self)

    def stop(self, reason: str) -> None:
        self._trainer.ended = reason

    @property
    def is_sharded(self) -> bool:
        return self._trainer.accelerator.distributed_type in SHARDED

    @property
    def output_dir(self) -> Path | None:
        return Path(self._trainer.args.output_dir) if self._trainer.args.output_dir else None

    @property
    def is_main_process(self) -> bool:
        return self._trainer.accelerator.is_main_process

    @property
    def schedule(self) -> float:
        return self._peak_and_factor()[1]

    def _peak_and_factor(self) -> tuple[float, float]:
        if self._trainer.optimizer is None:
            return self._trainer.args.learning_rate, 1.0
        return peak_and_factor(self.optimizer, self._trainer.lr_scheduler)

    @property
    def batch_size(self) -> int:
        # `auto_find_batch_size` lowers the trainer's own number and leaves the argument unchanged.
        return max(private.fitted_batch(self._trainer) // max(self._trainer.args.n_gpu, 1), 1)

    def _rows_per_batch(self, asked: int | None) -> int:
        """The live batch size; a requested size is lowered by the factor that the device required."""
        given = self._trainer.args.per_device_train_batch_size
        return self.batch_size if asked is None else max(asked * min(self.batch_size, given) // given, 1)

    def optimizer_defaults(self) -> dict[str, Any]:
        args = self._trainer.args
        return {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            "weight_decay": args.weight_decay,
        }

    def named_parameters(self) -> dict[str, Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def task_rows(self) -> Dataset:
        rows = self._trainer.train_dataset
        if not isinstance(rows, Dataset):
            raise ValueError(
                "A method asks for the task's own rows, but they are a stream, which has no end and cannot be read twice in "
                "the same order. Load them as a Dataset, or drop the method."
            )
        return self._kept(rows, "seq_lengths")

    def _kept(self, rows: Dataset, *more: str) -> Any:
        """Rows with the columns that the collator is given in extra passes; here all, as the trainer's own loader has them."""
        return rows

    def passes(
        self, rows: Dataset, batch_rows: int | None = None, alone: bool = False, what: str = ""
    ) -> Iterator[tuple[list[Batch], int]]:
        args = self._trainer.args
        size, world, rank = self.batch_size, args.world_size, args.process_index
        together = batch_rows or size * args.gradient_accumulation_steps * world
        kept = self._kept(rows)
        # All processes make the same number of forward passes; a row without labels stands in when none is left.
        blank = {**kept[0], "labels": [-100] * len(kept[0]["input_ids"])} if len(kept) else {}
        step = together * world if alone else together
        for start in tqdm(range(0, len(rows), step), desc=what, disable=args.disable_tqdm or not self.is_main_process):
            if alone:
                mine = range(min(start + rank * together, len(rows)), min(start + (rank + 1) * together, len(rows)))
                most, counted = together, len(mine)
            else:
                whole = range(start, min(start + together, len(rows)))
                mine, most, counted = whole[rank::world], -(-len(whole) // world), len(whole)
            parts = [[kept[i] for i in mine[first : first + size]] for first in range(0, most, size)]
            yield [self._collate(part) if part else _unlabelled(self._collate([blank])) for part in parts], counted

    def rows(self, method: Named) -> Dataset:
        raise KeyError(f"{type(method).__name__} adds no replay rows; its `replay` returned None.")

    def prepare(self, rows: Dataset, row_type: str = "same", name: str = "method") -> Dataset:
        checks.check_extra_rows(self._trainer, name)
        prepared = self._tokenised(rows, row_type, name)
        checks.check_token_ids(self._trainer, {name: prepared})
        check_collates(self._trainer, prepared, name)
        return prepared

    def _tokenised(self, rows: Dataset, row_type: str, name: str) -> Dataset:
        if not {"input_ids", "labels"} <= set(rows.column_names):
            raise ValueError(
                f"{name}: the rows have the columns {', '.join(rows.column_names)}, and {type(self._trainer).__name__} does not tell "
                f"how it turns rows into tokens. Give rows that have input_ids and labels, or train with ContinualTrainer, which "
                f"tokenises them like the task's rows."
            )
        prepared: Any = rows.with_format(None).select_columns(["input_ids", "labels"])
        self._trainer.row_digests[name] = digest_of(prepared)
        return prepared

    def batches(self, rows: Dataset, batch_size: int | None = None) -> Iterator[Batch]:
        size, kept = self._rows_per_batch(batch_size), self._kept(rows)
        for start in range(0, len(rows), size):
            yield self._collated(kept, range(start, min(start + size, len(rows))))

    def micro_batches(self, rows: Dataset, step: int, batch_size: int | None = None) -> list[Batch]:
        args = self._trainer.args
        size, kept = self._rows_per_batch(batch_size), self._kept(rows)
        slots = args.gradient_accumulation_steps * args.world_size
        mine = []
        for micro in range(args.gradient_accumulation_steps):
            first = (step * slots + micro * args.world_size + args.process_index) * size
            mine.append(self._collated(kept, [shuffled(self.seed, len(rows), first + i) for i in range(size)]))
        return mine

    def _collated(self, rows: Any, which: Sequence[int]) -> Batch:
        return self._collate([rows[i] for i in which])

    def _collate(self, rows: list[dict[str, Any]]) -> Batch:
        return private.on_device(self._trainer, private.task_collator(self._trainer)(rows))

    def loss(self, batch: Batch) -> Tensor:
        with self._trainer.compute_loss_context_manager():
            return self._trainer.model_wrapped(**{**batch, "use_cache": False}).loss

    def backward(self, loss: Tensor) -> None:
        self._trainer.accelerator.backward(loss)

    def gradients(
        self,
        batches: Sequence[Batch],
        scale: float = 1.0,
        clip: bool = True,
        training: bool = True,
        alone: bool = False,
    ) -> Tensor:
        return extra_gradients.gradients(self._trainer, batches, scale, clip, training, alone)

    def update(self, change: Callable[[], None] | None = None) -> bool:
        return extra_gradients.step(self._trainer, change)

    def zero_grad(self) -> None:
        self._trainer.model_wrapped.zero_grad()

    def optimizer_step(self) -> None:
        if self._trainer.args.max_grad_norm > 0:
            private.clip_or_norm(self._trainer, self._trainer.model_wrapped, clip=True)
        self.update()
        self.zero_grad()

    def note(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        self._trainer.ledger.add(name, total, count)

    @property
    def autocast_dtype(self) -> str | None:
        precision = self._trainer.accelerator.mixed_precision
        return None if precision == "no" else precision

    def autocast(self) -> AbstractContextManager[Any]:
        return self._trainer.accelerator.autocast()

    def mean(self, value: Tensor) -> Tensor:
        return self._trainer.accelerator.reduce(value, reduction="mean")

    def sum(self, value: Tensor) -> Tensor:
        return self._trainer.accelerator.reduce(value, reduction="sum")


def _unlabelled(batch: Batch) -> Batch:
    """A batch that no token is learned from, whatever labels its collator made."""
    return {**batch, "labels": batch["labels"].new_full(batch["labels"].shape, -100)}
