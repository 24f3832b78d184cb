"""Private members of Hugging Face's libraries in use here, each once; `tests/trainer/test_seams.py` checks them.

Overrides, and calls on ``self``, are in the classes themselves; their names and parameters are listed here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# Methods of SFTTrainer that subclasses here override: the private ones, and public ones whose parameters must not
# change.
OVERRIDDEN = {
    "create_optimizer": ["self", "model"],
    "get_train_dataloader": ["self"],
    "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "log": ["self", "logs", "start_time"],
    "_save_optimizer_and_scheduler": ["self", "output_dir"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "train": ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_save_rng_state": ["self", "output_dir"],
    "_run_epoch": [
        "self",
        "model",
        "epoch",
        "train_dataloader",
        "steps_in_epoch",
        "num_update_steps_per_epoch",
        "trial",
        "ignore_keys_for_eval",
        "start_time",
        "resume_from_checkpoint",
        "epochs_trained",
        "steps_trained_in_current_epoch",
    ],
    "save_model": ["self", "output_dir", "_internal_call"],
    "create_model_card": ["self", "model_name", "dataset_name", "tags"],
    "init_hf_repo": ["self", "token", "private"],
    "push_to_hub": ["self", "commit_message", "blocking", "token", "revision", "private", "kwargs"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "_finish_current_push": ["self"],
}
# Methods of SFTTrainer that are called, here or on ``self``.
CALLED = {
    "_prepare_dataset": ["self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"],
    "get_decay_parameter_names": ["self", "model"],
    "_clip_grad_norm": ["self", "model"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_prepare_inputs": ["self", "inputs"],
    "_get_num_items_in_batch": ["self", "batch_samples", "device"],
    "_get_collator_with_removed_columns": ["self", "data_collator", "description"],
    "_get_output_dir": ["self", "trial"],
    "_set_signature_columns_if_needed": ["self"],
    "compute_loss_context_manager": ["self"],
    "get_tp_size": ["self"],
}
# Attributes of SFTTrainer that are read or set.
ATTRIBUTES = (
    "_tokenizer", "padding_free", "completion_only_loss", "_formatting_func", "_is_vision_dataset", "_metrics",
    "_total_train_tokens", "_signature_columns", "_train_batch_size", "_tr_loss", "model_accepts_loss_kwargs",
    "current_gradient_accumulation_steps", "model_wrapped", "optimizer_cls_and_kwargs",
)  # fmt: skip


def is_known_absent(repo_id: str, file: str, revision: str | None) -> bool:
    """Whether the Hub cache records that a repository has no such file."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    return try_to_load_from_cache(repo_id, file, revision=revision) is _CACHED_NO_EXIST


def attention_of(config: Any) -> str:
    """The attention implementation of a model."""
    return config._attn_implementation


def loaded_from(config: Any) -> tuple[str, str | None]:
    """Folder or id that a model was loaded from, empty if none, and the commit of an id."""
    return config._name_or_path or "", getattr(config, "_commit_hash", None)


def class_for(auto: Any, config: Any) -> Any:
    """The class that an auto class would build for a configuration, or None."""
    return auto._model_mapping.get(type(config), None)


def fingerprint_of(rows: Any) -> str:
    """The fingerprint by which `datasets` identifies rows."""
    return rows._fingerprint


def tokenizer_of(trainer: Any) -> Any:
    """The tokenizer of a trainer, even if it was given a processor."""
    given = trainer.processing_class
    return getattr(trainer, "_tokenizer", None) or getattr(given, "tokenizer", given)


def has_images(trainer: Any) -> bool:
    """Whether the task's rows hold images, where the trainer knows."""
    return getattr(trainer, "_is_vision_dataset", False)


def formatting_of(trainer: Any) -> Any:
    """The function that turns each of the task's rows into text, or None."""
    return trainer._formatting_func


def tokenised(trainer: Any, rows: Any, args: Any, formatting: Any, name: str) -> Any:
    """Tokenise rows as the trainer tokenises the task's, one by one."""
    return trainer._prepare_dataset(rows, trainer.processing_class, args, False, formatting, name)


def tags_of(trainer: Any) -> list[str]:
    """Tags that TRL gives the models of a trainer class."""
    return trainer._tag_names


def fitted_batch(trainer: Any) -> int:
    """Rows of a micro-batch over the accelerators of this process, as lowered by `auto_find_batch_size`."""
    return trainer._train_batch_size


def task_collator(trainer: Any) -> Any:
    """The collator as the task's data loader uses it: without the columns that the model does not take."""
    return trainer._get_collator_with_removed_columns(trainer.data_collator)


def count_items(trainer: Any, batches: Sequence[Any]) -> Any:
    """Loss tokens of the micro-batches of a step, over all processes."""
    return trainer._get_num_items_in_batch(list(batches), trainer.args.device)


def on_device(trainer: Any, batch: Any) -> Any:
    """Move a collated batch to the trainer's device."""
    return trainer._prepare_inputs(batch)


def clip_or_norm(trainer: Any, model: Any, clip: bool) -> None:
    """Clip gradients as the trainer does; or only compute their norm, which also undoes the loss scaling."""
    if clip and trainer.args.max_grad_norm > 0:
        trainer._clip_grad_norm(model)
    else:
        trainer._get_grad_norm(model)


def tokens_seen(trainer: Any) -> int:
    """Tokens that a trainer has trained on since it was built, over all processes."""
    return int(trainer._total_train_tokens)


@contextmanager
def metrics_apart(trainer: Any) -> Iterator[None]:
    """Keep computations inside the context out of all metrics that TRL's trainer keeps; transformers' keeps none.

    Args:
        trainer: The trainer.

    Yields:
        None: While nothing is counted.
    """
    if not hasattr(trainer, "_metrics"):
        yield
        return
    kept = trainer._metrics, trainer._total_train_tokens
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    try:
        yield
    finally:
        trainer._metrics, trainer._total_train_tokens = kept


@contextmanager
def column_kept(trainer: Any, name: str) -> Iterator[None]:
    """Let a data loader that is created inside the context keep a column that the model does not take.

    Args:
        trainer: The trainer.
        name: The column.

    Yields:
        None: While it is kept.
    """
    trainer._set_signature_columns_if_needed()
    columns = trainer._signature_columns
    trainer._signature_columns = [*(columns or ()), name]
    try:
        yield
    finally:
        trainer._signature_columns = columns
