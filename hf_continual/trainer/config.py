"""ContinualConfig: SFTConfig and a few fields."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import is_torch_bf16_gpu_available

from hf_continual.bounds import one_of
from hf_continual.gauges import Gauges
from hf_continual.gauges.rules import SATURATED, Saturated, read_rules, read_weights
from hf_continual.gauges.spec import OPTIONS, TASK, read_gauges
from hf_continual.methods.base import Method
from hf_continual.methods.table import build_methods
from hf_continual.trainer.adapters import FROM_ADAPTER
from hf_continual.trainer.old_names import CONFIG, explains_old_names
from hf_continual.trainer.trl_trainer import SFTConfig
from hf_continual.training_numbers import check_numbers

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
        gauges: Measurements during training, on a handful of rows each: names and rows, see
            `hf_continual.gauges.spec.read_gauges`. By default the general text that GeRe, or a replay source called
            ``general``, adds; False measures nothing.
        stop_if: A rule or a list of rules on gauges that end training, such as ``"general/loss_change > 0.1 for 2"``: above 0.1
            nats by more than two standard errors in two measurements in a row. See `hf_continual.gauges.rules.read_rules`.
        rollback_if: The same; training ends with the weights of the last measurement that passed.
        keep_best: Measures whose weighted sum is smallest for the best weights, such as ``["task/loss",
            "general/loss"]``; training ends with those weights.
        stop_when: ``"task saturated"`` ends training once the loss of the task no longer falls.
        max_minutes: Minutes after which training saves and stops as on a signal, with exit code 75; None is no
            limit. It counts from the start of `train`.
        hub_base_model: Hub id of the base model, if `model` is a local copy of it.
        hub_license: Licence id of the pushed model, if the parents' licences differ.

    Raises:
        TypeError: If a hyper-parameter of a method has the wrong type.
        ValueError: If a method or a hyper-parameter is unknown or out of range.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "methods", "gauges", "keep_best"]  # noqa: RUF012 - the parent's is a list

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
    gauges: dict | str | None = field(
        default=None,
        metadata={
            "help": "What is measured during training, as JSON: names and rows, such as "
            '\'{"general": "general.jsonl", "old": {"rows": "old.jsonl", "kl": true}, "every": 50}\'.'
        },
    )
    stop_if: str | None = field(
        default=None, metadata={"help": "Rule on a gauge that ends training: 'general/loss_change > 0.1 for 2'."}
    )
    rollback_if: str | None = field(
        default=None,
        metadata={"help": "Rule that ends training with the weights of the last measurement that passed it."},
    )
    keep_best: dict | str | None = field(
        default=None,
        metadata={"help": "Measures whose sum is smallest where weights are best; training ends with those."},
    )
    stop_when: str | None = field(
        default=None, metadata={"help": "'task saturated' ends training once the loss of the task no longer falls."}
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
        gauges_of(self, ())

    def to_dict(self) -> dict[str, Any]:
        """As for every configuration; rows of gauges that were given as objects are named by their number."""
        plain = super().to_dict()
        if isinstance(self.gauges, dict):
            plain["gauges"] = {k: _without_rows(v) for k, v in self.gauges.items()}
        return plain


def _without_rows(given: Any) -> Any:
    """A gauge without its rows, for logs."""
    if isinstance(given, Mapping):
        return {key: _without_rows(value) if key == "rows" else value for key, value in given.items()}
    return given if given is None or isinstance(given, str | int | float | bool) else f"{len(given)} rows"


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
    methods = build_methods(described) if given is None else given
    if not isinstance(args, ContinualConfig) or isinstance(methods, str | Mapping | Method):
        return methods  # what cannot be methods is refused where they are put together
    built = list(methods)
    return [*built, *gauges_of(args, built)]


def gauges_of(args: ContinualConfig, methods: Sequence[Any]) -> list[Gauges]:
    """What is measured during a run.

    Args:
        args: The configuration.
        methods: The methods of the run.

    Returns:
        The gauges as a watcher among the methods; none if nothing is measured.

    Raises:
        TypeError: If gauges or rules have the wrong type.
        ValueError: If they cannot be understood, or rules have no gauges.
    """
    rules = {
        "stop_if": read_rules("ContinualConfig", "stop_if", args.stop_if),
        "rollback_if": read_rules("ContinualConfig", "rollback_if", args.rollback_if),
        "keep_best": read_weights("ContinualConfig", "keep_best", args.keep_best),
    }
    if args.stop_when not in (None, SATURATED):
        raise ValueError(f"ContinualConfig(stop_when={args.stop_when!r}) must be {SATURATED!r} or None.")
    given: Any = args.gauges
    if isinstance(given, str):
        given = {"true": True, "false": False}.get(given.lower(), {"general": given})
    if given is None or given is True:
        given = {**_general_of(methods), **({TASK: {}} if given or args.stop_when else {})}
        if given and (args.deepspeed or args.fsdp) and args.gauges is None and not any(rules.values()):
            given = {}
    if not given:
        if asked := [key for key, value in rules.items() if value]:
            raise ValueError(
                f"ContinualConfig({asked[0]}=...) is a rule on gauges, and there are none. Say what is measured: "
                f"gauges={{'general': 'general.jsonl'}}."
            )
        return []
    if isinstance(given, dict) and args.stop_when and TASK not in given:
        given = {**given, TASK: {"kl": False}}
    if isinstance(given, dict) and not set(given) - set(OPTIONS):
        given = {**_general_of(methods), TASK: {}, **given}
    named, options = read_gauges(given)
    return [Gauges(named, **rules, saturated=Saturated() if args.stop_when else None, **options)]


def _general_of(methods: Sequence[Any]) -> dict[str, Any]:
    """The general text that a method replays, as a gauge: GeRe's, or that of a replay source called "general"."""
    for method in methods:
        if isinstance(method, Method) and (method.general_text or (method.added_rows() and method.name == "general")):
            return {"general": {"source": method.name}}
    return {}
