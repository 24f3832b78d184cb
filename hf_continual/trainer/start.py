"""The start of a run: a model by path or id, an adapter to continue or build on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer, set_seed
from transformers.utils.peft_utils import find_adapter_config_file

from hf_continual.hub.damaged import loading, not_found
from hf_continual.notice import notice
from hf_continual.paths import check_is_there
from hf_continual.trainer.adapters import (
    CONTINUE,
    EARLIER,
    MERGED,
    STACK,
    adapter_on,
    choose_way,
    consequence,
    is_adapter,
    merge_into_base,
    stacked,
)
from hf_continual.trainer.own_modules import config_to_add
from hf_continual.trainer.predecessor import named_by
from hf_continual.trainer.trl_trainer import create_model_from_path

if TYPE_CHECKING:
    from hf_continual.methods.base import Method

logger = logging.getLogger(__name__)


@dataclass
class Start:
    """The arguments that `SFTTrainer` gets in place of an adapter's path.

    Args:
        model: A model, or the argument unchanged.
        processing_class: The adapter's tokenizer if none was given.
        peft_config: The adapter that the trainer still has to add.
        source: Folder or Hub id of the weights; None for a model that records none.
        opened: Whether it was opened here, with the options given for loading.
    """

    model: Any
    processing_class: Any
    peft_config: PeftConfig | None
    source: str | None = None
    opened: bool = False


def open_start(
    model: Any,
    args: Any,
    processing_class: Any,
    peft_config: Any,
    quantization_config: Any,
    bringing: Method | None = None,
) -> Start:
    """Open the folder or Hub id of an adapter; SFTTrainer opens everything else.

    `ContinualConfig.from_adapter` decides what is done with the adapter: it is trained further, kept under a new one,
    or merged into its base. The consequence is printed.

    Args:
        model: As given to the trainer; so are the other parameters.
        args: Training arguments, or None.
        processing_class: A tokenizer, or None.
        peft_config: A new adapter, or None.
        quantization_config: Quantisation of the base, or None.
        bringing: The method that supplies its own modules, or None.

    Returns:
        Arguments for SFTTrainer.

    Raises:
        ValueError: If training cannot start from the adapter.
    """
    asked = getattr(args, "from_adapter", None)
    if not isinstance(model, str):
        held = model.active_peft_config if isinstance(model, PeftModel) else None
        peft_config = config_to_add(bringing, held, f"the {type(model).__name__}", asked, peft_config)
        return Start(model, processing_class, peft_config, source=named_by(model))
    check_is_there(model, "the model")
    options = dict(getattr(args, "model_init_kwargs", None) or {})
    revision = options.pop("revision", None)
    file = find_adapter_config_file(model, revision=revision)
    if file is None:
        if asked is not None:
            raise ValueError(
                f"from_adapter={asked!r} says what to do with an adapter, but {model} is not one (there is no "
                f"adapter_config.json). Drop it, or give the adapter's folder."
            )
        return Start(model, processing_class, config_to_add(bringing, None, model, None, peft_config), source=model)
    folder = Path(file).parent if Path(model).is_dir() else _downloaded(model, revision)
    config = PeftConfig.from_pretrained(str(folder))
    peft_config = config_to_add(bringing, config, model, asked, peft_config)
    way = choose_way(asked, model, peft_config)
    set_seed(42 if args is None else args.seed)  # as SFTTrainer does before it draws an adapter
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if config.revision is not None:
        options["revision"] = config.revision
    with loading(str(config.base_model_name_or_path), f"the base model of the adapter {model}"):
        base = create_model_from_path(str(config.base_model_name_or_path), **options)
    if processing_class is None and any(folder.glob("tokenizer*")):
        processing_class = AutoTokenizer.from_pretrained(folder)
    target = Path("trainer_output" if args is None else args.output_dir) / MERGED
    notice(logger, consequence(way, model, config, peft_config, str(target)))
    if way == CONTINUE:
        return Start(adapter_on(base, folder, is_trainable=True), processing_class, None, model, True)
    if way == STACK:
        opened = stacked(adapter_on(base, folder, adapter_name=EARLIER), folder, peft_config)
        return Start(opened, processing_class, None, model, True)
    return Start(merge_into_base(base, folder, target, processing_class), processing_class, peft_config, model, True)


@contextmanager
def options_used(args: Any, start: Start) -> Iterator[None]:
    """Explain a model that SFTTrainer does not find, and hide some options from SFTTrainer while it is built.

    Hidden are `model_init_kwargs`, if the model was opened with them, and `enable_jit_checkpoint`, whose handler would
    mistake the end of `train` for the end of the task; see `stop`.
    """
    used = {"model_init_kwargs": None} if start.opened else {}
    used = {**used, "enable_jit_checkpoint": False}
    given = {name: getattr(args, name) for name in used if hasattr(args, name)}
    for name in given:
        setattr(args, name, used[name])
    try:
        yield
    except OSError as error:
        if isinstance(start.model, str) and (sentence := not_found(start.model, "the model", error)):
            raise FileNotFoundError(sentence) from error
        raise
    finally:
        for name, value in given.items():
            setattr(args, name, value)


def _downloaded(model: str, revision: str | None) -> Path:
    return Path(snapshot_download(model, revision=revision))


__all__ = ["Start", "is_adapter", "open_start", "options_used"]
