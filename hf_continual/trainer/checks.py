"""Refuse at construction what cannot work; errors say what was found, why it cannot work, and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, IterableDataset
from peft import PeftModel

from hf_continual import private
from hf_continual.data.rows import row_lengths
from hf_continual.methods.compose import Methods
from hf_continual.tensors.reference import learned_positions, most_tokens
from hf_continual.tensors.whole import shape_of
from hf_continual.trainer.parallelism import check_parallelism

if TYPE_CHECKING:
    from torch import nn

    from hf_continual.data.replay import ReplayRows
    from hf_continual.trainer.live import LiveTrainer

# With any of these the optimizer was left at the default, so a method may choose it.
PLAIN_ADAM = ("adamw_torch", "adamw_torch_fused")


def check_train_dataset(rows: Any) -> None:
    """Refuse an empty dataset, or a dictionary of several; SFTTrainer checks everything else."""
    if isinstance(rows, dict):
        raise TypeError(
            f"train_dataset is a {type(rows).__name__} with the splits {', '.join(map(str, rows))}; a run learns from one. "
            f"Pass one of them, such as train_dataset=data[{next(iter(rows), 'train')!r}]."
        )
    if isinstance(rows, Dataset) and len(rows) == 0:
        raise ValueError("train_dataset has 0 rows: there is nothing to learn. Check the split or the filter.")


def first_row(rows: Any) -> dict[str, Any]:
    """The first raw row of the task, for comparison with replay rows; empty if SFTTrainer will refuse the rows.

    Args:
        rows: The `train_dataset` argument.

    Returns:
        The row.

    Raises:
        ValueError: If a streaming dataset yields nothing.
    """
    if not isinstance(rows, Dataset | IterableDataset):
        return {}
    row = next(iter(rows), None)
    if row is None:
        raise ValueError("train_dataset is a stream that yields no rows: there is nothing to learn.")
    return dict(row)


def check_arguments(
    methods: Methods, args: Any, compute_loss_func: Any, optimizers: Any, optimizer_cls_and_kwargs: Any
) -> None:
    """Check for conflicts that can be found before the model is loaded.

    Args:
        methods: The methods of the run.
        args: Training arguments, or None for the defaults.
        compute_loss_func: As given to the trainer.
        optimizers: As given to the trainer.
        optimizer_cls_and_kwargs: As given to the trainer.

    Raises:
        ValueError: If two optimizers are requested, or a method reads a forward pass whose loss
            is computed elsewhere.
    """
    if (bringing := methods.optimizing) is not None:
        name = type(bringing).__name__
        given = None
        if optimizers[0] is not None:
            given = f"optimizers=({type(optimizers[0]).__name__}, ...)"
        elif optimizer_cls_and_kwargs is not None:
            given = f"optimizer_cls_and_kwargs=({optimizer_cls_and_kwargs[0].__name__}, ...)"
        elif args is not None and str(getattr(args.optim, "value", args.optim)) not in PLAIN_ADAM:
            given = f"optim={str(getattr(args.optim, 'value', args.optim))!r}"
        if given:
            raise ValueError(
                f"{name} supplies an optimizer and {given} asks for another; a run can have only one. Drop one of the two."
            )
    weighing = [type(m).__name__ for m in methods if m.weighs_tokens()]
    if weighing and getattr(args, "loss_type", "nll") != "nll":
        raise ValueError(
            f"{weighing[0]} weighs the tokens of the loss, and loss_type={args.loss_type!r} does so too: both weights would be "
            f"multiplied. Use loss_type='nll', or drop {weighing[0]}."
        )
    smoothing = args is not None and args.label_smoothing_factor > 0 and getattr(args, "loss_type", "nll") == "nll"
    if compute_loss_func is not None or smoothing:
        reading = [type(m).__name__ for m in methods if m.reads_forward()]
        weighted = [type(m).__name__ for m in methods if (added := m.added_rows()) is not None and added.weight != 1]
        if reading or weighted:
            what = "compute_loss_func" if compute_loss_func is not None else "label_smoothing_factor"
            raise ValueError(
                f"{', '.join(reading or weighted)} must read the forward pass that the loss comes from, but with "
                f"{what} the loss comes from elsewhere. Drop {what}, or that method (Replay needs weight=1)."
            )


def check_trainer(trainer: LiveTrainer) -> None:
    """Check for conflicts between the methods and the training setup.

    Args:
        trainer: The trainer, set up except for its methods.

    Raises:
        ValueError: If the model is not decoder-only, nothing is trainable, a method cannot run in this setup, or
            the processes have different numbers of rows.
    """
    check_decoder_only(trainer.run.model)
    check_trainable(trainer.run.model)
    check_parallelism(trainer)


def check_decoder_only(model: nn.Module) -> None:
    """Refuse a model that is not decoder-only, as the loss, the rows and the states require.

    Args:
        model: The model without wrappers such as DDP's.

    Raises:
        ValueError: If the model has an encoder.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        raise ValueError(
            f"{type(base).__name__} is an encoder-decoder (config.is_encoder_decoder=True), and SFTTrainer gives a model "
            f"whole texts: the encoder would read the tokens that the decoder must predict. Use a decoder-only model."
        )


def check_trainable(model: nn.Module) -> None:
    """Refuse a model without trainable parameters.

    Args:
        model: The model without wrappers such as DDP's.

    Raises:
        ValueError: If no parameter is trainable, as after `PeftModel.from_pretrained` without `is_trainable`.
    """
    if any(p.requires_grad for p in model.parameters()):
        return
    if isinstance(model, PeftModel):
        raise ValueError(
            f"No parameter of the {type(model).__name__} is trainable: PEFT loads an adapter for inference unless it is "
            f"told otherwise, so the adapter {', '.join(model.active_adapters)!r} would not move. Load it with "
            f"PeftModel.from_pretrained(base, folder, is_trainable=True)."
        )
    raise ValueError(
        f"No parameter of {type(model).__name__} is trainable: all have requires_grad=False, so there is nothing to "
        f"learn. Call model.requires_grad_(True), or give peft_config=LoraConfig(...) to train an adapter."
    )


def check_replay(trainer: LiveTrainer, sources: dict[str, ReplayRows]) -> None:
    """Refuse training setups that replay rows cannot join.

    Args:
        trainer: The trainer, set up except for its methods.
        sources: Replay rows by method name.

    Raises:
        ValueError: Under context or sequence parallelism, with images, or with a weight if the loss
            is not divided by the number of tokens.
    """
    check_extra_rows(trainer, "Replay")
    weighted = [name for name, source in sources.items() if source.weight != 1]
    if weighted and not trainer.model_accepts_loss_kwargs:
        raise ValueError(
            f"{weighted[0]}: weight={sources[weighted[0]].weight:g} needs the loss as a mean over all tokens of a "
            f"step, and {type(trainer.model).__name__} does not accept the number of tokens. Use weight=1."
        )


def check_extra_rows(trainer: LiveTrainer, name: str) -> None:
    """Refuse training setups that extra rows cannot join.

    Args:
        trainer: The trainer, set up except for its methods.
        name: Name of the method that adds the rows.

    Raises:
        ValueError: Under context or sequence parallelism, with images, or if text attends to later tokens.
    """
    text = trainer.run.model.config.get_text_config()  # pyrefly: ignore[missing-attribute]
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        raise ValueError(
            f"{name}: {type(trainer.run.model).__name__} attends to later tokens of a text "
            f"(use_bidirectional_attention={text.use_bidirectional_attention!r}), so a row of text would be read before "
            f"it is predicted. Train without {name}, or use a causal language model."
        )
    parallel = trainer.accelerator.parallelism_config
    if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
        raise ValueError(
            f"{name}: rows cannot join batches that are split along the sequence (context or sequence parallelism): "
            f"the split is fixed before the rows are drawn. Set cp_size=1 and sp_size=1."
        )
    if private.has_images(trainer):
        raise ValueError(f"{name} supports text only, and the training rows hold images. Train without {name}.")


def check_token_ids(trainer: LiveTrainer, rows: dict[str, Dataset]) -> None:
    """Refuse replay rows whose token ids the model's embedding does not have, or that are too long for it.

    Args:
        trainer: The trainer, set up except for its methods.
        rows: Tokenised replay rows by method name.

    Raises:
        ValueError: If a row holds a token that the model's embedding does not have, or more tokens than the model has
            positions.
    """
    size = shape_of(trainer.run.model.get_input_embeddings().weight)[0]  # pyrefly: ignore[not-callable]
    tokenizer = private.tokenizer_of(trainer)
    knows = 0 if tokenizer is None else len(tokenizer)
    most = most_tokens(trainer.run.model) if learned_positions(trainer.run.model) else None
    for name, prepared in rows.items():
        if most is not None and (longest := int(row_lengths(prepared).max())) > most:
            raise ValueError(
                f"{name}: a row has {longest} tokens but the model has positions for {most}. Set max_length={most}."
            )
        column = prepared.with_format("arrow")[:]["input_ids"].combine_chunks()
        ids = np.asarray(column.flatten())
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= size:
            wrong = high if high >= size else low
            cause = (
                "The rows were tokenised with a different tokenizer; tokenise them with this one, or pass them as text."
            )
            if size <= wrong < knows:
                # A tokenizer may have spare tokens that the model never learned, as long as no row contains one.
                cause = (
                    f"The tokenizer knows {knows} tokens and the model embeds {size}: they do not belong together, or "
                    f"model.resize_token_embeddings(len(tokenizer)) is missing."
                )
            raise ValueError(
                f"{name}: a replay row holds the token id {wrong}, but the model embeds ids 0 to {size - 1}. {cause}"
            )
