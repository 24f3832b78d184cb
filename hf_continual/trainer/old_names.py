"""Spellings from older tutorials, each with a message that names the current one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

CONFIG = {
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "warmup_ratio": "warmup_steps (a float below 1 is a fraction of the run)",
    "group_by_length": "train_sampling_strategy='group_by_length'",
    "dft_loss": "loss_type='dft'",
    "overwrite_output_dir": "nothing: an output folder is always written into",
    "push_to_hub_token": "hub_token",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
}
TRAINER = {
    "tokenizer": "processing_class=",
    "packing": "ContinualConfig(packing=...)",
    "dataset_text_field": "ContinualConfig(dataset_text_field=...)",
    "max_seq_length": "ContinualConfig(max_length=...)",
    "max_length": "ContinualConfig(max_length=...)",
    "model_init_kwargs": "ContinualConfig(model_init_kwargs=...)",
    "dataset_kwargs": "ContinualConfig(dataset_kwargs=...)",
    "model_init": "a model or its name: ContinualTrainer(model=...)",
}


def explains_old_names(names: Mapping[str, str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate an ``__init__`` so that an old spelling raises a clear error; the signature is unchanged.

    Args:
        names: Old spelling -> what to write now.

    Returns:
        The decorator. The decorated function raises TypeError for a keyword in `names`.
    """

    def decorate(init: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(init)
        def checked(self: Any, *args: Any, **kwargs: Any) -> None:
            for old in names.keys() & kwargs.keys():
                raise TypeError(
                    f"{type(self).__name__}({old}={kwargs[old]!r}): {old!r} is the spelling of an older TRL or "
                    f"transformers. Today it is {names[old]}."
                )
            init(self, *args, **kwargs)

        return checked

    return decorate
