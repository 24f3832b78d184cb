"""ContinualTrainer: TRL's SFTTrainer with methods. Only this file and `saving_trainer.py` override HF's trainers.

Each override first delegates to SFTTrainer if no method needs it, so that a trainer without
methods is SFTTrainer bit for bit: no hook, no wrapped collator, no extra draw, term, log key or file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset

from hf_continual.data.collator import ORIGIN
from hf_continual.methods.base import Forward, Method
from hf_continual.methods.compose import Methods
from hf_continual.tasks import Task
from hf_continual.trainer import checks, hand_over, own_modules
from hf_continual.trainer.collating import rows_named, rows_paired, tokens_counted
from hf_continual.trainer.config import ContinualConfig, methods_of
from hf_continual.trainer.old_names import TRAINER, explains_old_names
from hf_continual.trainer.publish import Publisher
from hf_continual.trainer.saving_trainer import SavingTrainer
from hf_continual.trainer.sft_run import SFTRun
from hf_continual.trainer.start import open_start, options_used
from hf_continual.trainer.tap import ForwardTap, with_virtual_tokens
from hf_continual.trainer.terms import added_loss

if TYPE_CHECKING:
    from datasets import DatasetDict, IterableDatasetDict
    from peft import PeftConfig, PeftModel
    from torch import Tensor
    from transformers import (
        BitsAndBytesConfig,
        DataCollator,
        EvalPrediction,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
        TrainingArguments,
    )
    from trl import SFTConfig


logger = logging.getLogger(__name__)


class ContinualTrainer(SavingTrainer):
    """Supervised fine-tuning that keeps what the model already knows.

    Takes the arguments of `trl.SFTTrainer`, in the same order, and `methods`. Without methods it is
    SFTTrainer bit for bit. One thing is not as there: a run that is resumed from the checkpoint of its last step, within an
    epoch, makes no further step.

    Example:
        >>> trainer = ContinualTrainer(
        ...     "Qwen/Qwen2.5-0.5B",
        ...     ContinualConfig("out"),
        ...     train_dataset=task,
        ...     methods=[Replay(old_rows, ratio=0.1), FreezeLayers(bottom=3), RecAdam(pull=0.01)],
        ... )
        >>> trainer.train()

    Args:
        model: As in SFTTrainer; so are all parameters up to `formatting_func`.
        args: A `ContinualConfig`; an `SFTConfig` or `TrainingArguments` is accepted too.
        data_collator: See SFTTrainer.
        train_dataset: See SFTTrainer; a streaming dataset is accepted with replay, too.
        eval_dataset: See SFTTrainer. Evaluation never sees replay rows or loss terms.
        processing_class: See SFTTrainer.
        compute_loss_func: See SFTTrainer. Not with methods that read the forward pass.
        compute_metrics: See SFTTrainer.
        callbacks: See SFTTrainer.
        optimizers: See SFTTrainer. Not with a method that supplies an optimizer.
        optimizer_cls_and_kwargs: See SFTTrainer. Not with a method that supplies an optimizer.
        preprocess_logits_for_metrics: See SFTTrainer.
        quantization_config: See SFTTrainer.
        peft_config: See SFTTrainer.
        formatting_func: See SFTTrainer; applied to replay rows of the task's type as well.
        methods: The methods in the order in which they edit gradients and weights.

    Raises:
        TypeError: If something has the wrong type, or an old spelling is used.
        ValueError: If methods do not fit each other, the data, or the training setup.
    """

    @explains_old_names(TRAINER)
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict], str] | None = None,
        *,
        methods: Iterable[Method] | None = None,
    ) -> None:
        self.methods = Methods(methods_of(args, methods))
        checks.check_train_dataset(train_dataset)
        if self.methods:
            checks.check_arguments(self.methods, args, compute_loss_func, optimizers, optimizer_cls_and_kwargs)
        task_row = checks.first_row(train_dataset) if self.methods else {}
        left = hand_over.left_with(model, args) if self.methods else None
        start = open_start(model, args, processing_class, peft_config, quantization_config, self.methods.adapting)
        self.publisher = Publisher(self, len(train_dataset) if isinstance(train_dataset, Dataset) else None)
        with options_used(args, start):
            super().__init__(
                model=start.model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=start.processing_class,
                compute_loss_func=compute_loss_func,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                quantization_config=None if start.opened else quantization_config,
                peft_config=start.peft_config,
                formatting_func=formatting_func,
            )
        self.begin_without_methods(self.args)
        if self.methods:
            self._set_up_methods(task_row)
        self.predecessor = hand_over.open_predecessor(self, start.source, left)
        if self.args.push_to_hub and self.is_world_process_zero():
            self.publisher.check_before_training()

    def _set_up_methods(self, task_row: dict[str, Any]) -> None:
        name, index = "task", 0
        if isinstance(self.args, ContinualConfig):
            name, index = self.args.task_name, self.args.task_index
        self.task_row = task_row
        self.set_up_methods(SFTRun(self, Task(name, index)))
        if self.mixer or any(method.reads_forward() or method.makes_rows() for method in self.methods):
            self.tap = ForwardTap(self.run.model, self.methods.taps, self.is_compiled())

    def check_setup(self) -> None:
        """Refuse methods that do not fit the training setup, or the layout of the rows."""
        super().check_setup()
        own_modules.check_layout(self)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """SFTTrainer's data loader, which also counts tokens and names rows if methods need it."""
        with rows_named(self), tokens_counted(self), rows_paired(self):
            return super().get_train_dataloader()

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The micro-batches of an optimizer step with their replay rows, and the step's loss tokens."""
        mixed = epoch_iterator if self.mixer is None else self.mixer.mixed(epoch_iterator)
        batches, tokens = super().get_batch_samples(mixed, num_batches, device)
        self.step_batches = batches if self.methods.at("begin_step") else []
        sources = () if self.mixer is None else self.mixer.sources
        discount = [(k, 1 - s.weight) for k, s in enumerate(sources) if s.weight != 1]
        if tokens is None or not discount:
            return batches, tokens
        # A replayed token of weight w counts as w tokens in the loss mean.
        less = torch.zeros((), device=device)
        for batch in batches:
            source, labels = batch[ORIGIN]["source"][:, 1:], batch["labels"][:, 1:]
            for k, missing in discount:
                less += missing * ((source == k) & (labels != -100)).sum()
        if self.args.average_tokens_across_devices:
            less = self.accelerator.reduce(less, reduction="sum")
        return batches, tokens - less

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """SFTTrainer's loss, plus the terms of the methods, from one forward pass."""
        origin = inputs.pop(ORIGIN, None)
        if self.tap is None or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.tap.record():
            result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            forward = self._forward(inputs, origin, num_items_in_batch)
            extra = added_loss(
                self, forward, 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            )
        if extra is None:
            return result
        return (result[0] + extra, result[1]) if return_outputs else result + extra

    def _forward(
        self, inputs: dict[str, Any], origin: dict[str, Any] | None, tokens: torch.Tensor | int | None
    ) -> Forward:
        assert self.tap is not None
        outputs: Any = self.tap.heard()
        loss_BS = -outputs.log_probs
        if origin is None:
            used = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            nowhere = torch.full_like(inputs["input_ids"], -1)
            origin = {"source": torch.where(used, -1, -100), "row": nowhere, "offset": nowhere}
        inputs, origin = with_virtual_tokens(inputs, origin, loss_BS.shape[1] + 1)
        self._log_sources(inputs, origin, loss_BS.detach())
        if self.args.loss_type == "dft":
            loss_BS = loss_BS * outputs.log_probs.exp().detach()
        scale = 1.0
        if tokens is None:
            tokens = outputs.label_mask.sum().clamp(min=1)
        else:
            scale = float(self.current_gradient_accumulation_steps)
            if self.args.average_tokens_across_devices:
                scale *= self.accelerator.num_processes // self.get_tp_size()
        return Forward(
            inputs=inputs,
            token_loss_BS=loss_BS,
            taps=dict(self.tap.seen),
            source_BS=origin["source"],
            row_BS=origin["row"],
            offset_BS=origin["offset"],
            sources=self.mixer.names if self.mixer else (),
            tokens=torch.as_tensor(tokens, device=loss_BS.device).clamp(min=1),
            scale=scale,
            drawn=origin.get("drawn", ()),
            task_drawn=origin.get("named", ()),
            entropy_BS=None if outputs.entropy is None else outputs.entropy.detach(),
        )

    def _log_sources(self, inputs: dict[str, Any], origin: dict[str, Any], nll_BS: Tensor) -> None:
        """Log the negative log-likelihood per token of the task and of each replay source."""
        if self.mixer is None:
            return
        source, trained = origin["source"][:, 1:], inputs["labels"][:, 1:] != -100
        for k, name in enumerate(("task", *self.mixer.names), start=-1):
            of_source = trained & (source == k)
            self.ledger.add(f"{name}/loss", (nll_BS * of_source).sum(), of_source.sum())
