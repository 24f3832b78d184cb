"""ContinualConfig: SFTConfig and a few fields."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from hf_continual.bounds import one_of
from hf_continual.methods.table import build_methods
from hf_continual.trainer.adapters import FROM_ADAPTER
from hf_continual.trainer.old_names import CONFIG, explains_old_names
from hf_continual.training_numbers import check_numbers

if TYPE_CHECKING:
    from hf_continual.methods.base import Method


STRATEGIES = ("save_strategy", "eval_strategy", "logging_strategy")


@dataclass
class ContinualConfig(SFTConfig):
    """Training arguments of `ContinualTrainer`: everything in `trl.SFTConfig`, plus the methods
    against forgetting.

    With the fields below at their defaults it is an SFTConfig, with one exception: where SFTConfig would fail because
    the machine has no accelerator with bf16, such as on a CPU, it trains in fp32 unless `bf16` was set explicitly.

    Args:
        methods: The methods as data: a name, a mapping of names to hyper-parameters, or a list of
            these; on a command line as JSON. Exclusive with ``ContinualTrainer(methods=...)``.
        task_name: Name of the task in logs, folders and cards.
        task_index: Place of the task in its sequence, counted from 0.
        predecessor: Folder or Hub id of the previous task, if the model does not tell: its methods' state is
            loaded. A model given by path or id tells.
        fresh_methods: Start without what the methods of the previous task left.
        from_adapter: What to do with a model that is the folder or Hub id of an adapter: ``continue`` trains it further,
            ``stack`` freezes it under a new adapter and saves both as one, ``merge_then_new`` merges it into its base,
            saves that as ``output_dir/merged-base`` and trains a new adapter on it. By default ``stack`` with a
            ``peft_config``, else ``continue``.
        max_minutes: Minutes after which training saves and stops as on a signal, with exit code 75; None is no
            limit. It counts from the start of `train`.
        hub_base_model: Hub id of the base model, if `model` is a local copy of it.
        hub_license: Licence id of the pushed model, if the parents' licences differ.

    Raises:
        TypeError: If a hyper-parameter of a method has the wrong type.
        ValueError: If a method or a hyper-parameter is unknown or out of range.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "methods"]  # noqa: RUF012 - the parent's is a list

    # `dict | str | None` is the widest type that HfArgumentParser can read; a list is accepted too.
    methods: dict | str | None = field(
        default=None,
        metadata={
            "help": "Methods against forgetting: a name, a JSON mapping of names to hyper-parameters, or a "
            'list of these, such as \'{"freeze": {"bottom": 3}}\'.'
        },
    )
    task_name: str = field(default="task", metadata={"help": "Name of the task."})
    task_index: int = field(default=0, metadata={"help": "Place of the task in its sequence, counted from 0."})
    predecessor: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of the previous task, if the model does not tell."},
    )
    fresh_methods: bool = field(
        default=False, metadata={"help": "Start without what the methods of the previous task left."}
    )
    from_adapter: str | None = field(
        default=None,
        metadata={
            "help": "What to do with a model that is an adapter: continue, stack or merge_then_new.",
        },
    )
    max_minutes: float | None = field(
        default=None, metadata={"help": "Minutes after which training saves and stops; it can be resumed."}
    )
    hub_base_model: str | None = field(
        default=None,
        metadata={"help": "Hub id of the base model, if the model is a local copy of it."},
    )
    hub_license: str | None = field(
        default=None, metadata={"help": "Licence id of the pushed model, if the parents' licences differ."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.methods, str) and self.methods.lstrip().startswith("["):
            self.methods = json.loads(self.methods)
        for name in STRATEGIES:
            if getattr(self, name) is False:
                setattr(self, name, "no")  # YAML reads `save_strategy: no` as false
        if self.bf16 is None and not (self.fp16 or self.use_cpu) and not is_torch_bf16_gpu_available():
            self.bf16 = False  # where SFTConfig would fail, because this machine has no accelerator with bf16
        super().__post_init__()
        if self.task_index < 0:
            raise ValueError(f"task_index={self.task_index} must be 0 or more: tasks are counted from 0.")
        if self.max_minutes is not None and not 0 < self.max_minutes < float("inf"):
            raise ValueError(f"max_minutes={self.max_minutes} must be above 0; None is no limit.")
        one_of("ContinualConfig", "from_adapter", self.from_adapter, (None, *FROM_ADAPTER))
        if problem := check_numbers(vars(self), trains=False):
            raise ValueError(problem[1])
        # Built and discarded: a wrong name or type must fail here, before any weights are loaded.
        build_methods(self.methods)


ContinualConfig.__init__ = explains_old_names(CONFIG)(ContinualConfig.__init__)  # pyrefly: ignore[bad-assignment]


def methods_of(args: Any, given: Iterable[Method] | None) -> Iterable[Method]:
    """The methods of a run.

    Args:
        args: Training arguments, or None.
        given: ``ContinualTrainer(methods=...)``.

    Returns:
        The methods given, or those described by the arguments, built.

    Raises:
        ValueError: If both specify methods.
    """
    described = args.methods if isinstance(args, ContinualConfig) else None
    if given is not None and described is not None:
        raise ValueError(
            "methods are given twice: as ContinualTrainer(methods=...) and as ContinualConfig(methods=...). "
            "Keep one of the two."
        )
    return build_methods(described) if given is None else given
