"""TrainerRun: what a method sees of the trainer, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType

from hf_continual.methods.base import Batch, Method

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from torch import Tensor, nn
    from torch.nn import Parameter
    from torch.optim import Optimizer
    from transformers import PreTrainedTokenizerBase

    from hf_continual.tasks import Task
    from hf_continual.trainer.trainer import ContinualTrainer

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


class TrainerRun:
    """Implements `hf_continual.methods.base.Run` over a ContinualTrainer; documented there."""

    def __init__(self, trainer: ContinualTrainer, task: Task) -> None:
        self._trainer = trainer
        self.task = task

    @property
    def model(self) -> nn.Module:
        return self._trainer.accelerator.unwrap_model(self._trainer.model, keep_torch_compile=False)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._trainer._tokenizer

    @property
    def step(self) -> int:
        return self._trainer.state.global_step

    @property
    def max_steps(self) -> int:
        return max(self._trainer.state.max_steps, 0)

    @property
    def learning_rate(self) -> float:
        return self._trainer.args.learning_rate

    @property
    def seed(self) -> int:
        args = self._trainer.args
        return args.seed if args.data_seed is None else args.data_seed

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
    def is_sharded(self) -> bool:
        return self._trainer.accelerator.distributed_type in SHARDED

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

    def rows(self, method: Method) -> Dataset:
        if self._trainer.mixer is None or method.name not in self._trainer.mixer.names:
            raise KeyError(f"{type(method).__name__} brings no replay rows; its `replay` returned None.")
        return self._trainer.mixer.rows[self._trainer.mixer.names.index(method.name)]

    def prepare(self, rows: Dataset, row_type: str = "same") -> Dataset:
        return self._trainer.prepare_rows(rows, row_type, "method")

    def batches(self, rows: Dataset, batch_size: int | None = None) -> Iterator[Batch]:
        size = batch_size or self._trainer.args.per_device_train_batch_size
        kept: Any = rows.select_columns([c for c in ("input_ids", "labels") if c in rows.column_names])
        for start in range(0, len(rows), size):
            picked = [kept[i] for i in range(start, min(start + size, len(rows)))]
            yield self._trainer._prepare_inputs(self._trainer.data_collator(picked))

    def loss(self, batch: Batch) -> Tensor:
        with self._trainer.compute_loss_context_manager():
            return self._trainer.model_wrapped(**{**batch, "use_cache": False}, fused_lm_head=True).loss

    def backward(self, loss: Tensor) -> None:
        self._trainer.accelerator.backward(loss)

    def optimizer_step(self) -> None:
        trainer = self._trainer
        assert trainer.optimizer is not None
        if trainer.args.max_grad_norm > 0:
            trainer._clip_grad_norm(trainer.model_wrapped)
        trainer.optimizer.step()
        trainer.model_wrapped.zero_grad()

    @property
    def autocast_dtype(self) -> str | None:
        precision = self._trainer.accelerator.mixed_precision
        return None if precision == "no" else precision

    def autocast(self) -> AbstractContextManager[Any]:
        return self._trainer.accelerator.autocast()

    def mean(self, value: Tensor) -> Tensor:
        return self._trainer.accelerator.reduce(value, reduction="mean")
