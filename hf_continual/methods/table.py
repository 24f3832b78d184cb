"""The table of methods, and methods built from plain data (YAML, JSON, a command line).

Importing this module imports no method and no torch. A new method is one row here and one file next to this one;
recipes/guide/extending.md lists what else belongs to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from hf_continual.named import did_you_mean, imported
from hf_continual.option_names import option_names

if TYPE_CHECKING:
    from hf_continual.methods.base import Method

TABLE: dict[str, str] = {
    "replay": "hf_continual.methods.replay:Replay",
    "gere": "hf_continual.methods.gere.method:GeRe",
    "freeze": "hf_continual.methods.freeze:FreezeLayers",
    "kif": "hf_continual.methods.kif.method:KIF",
    "recadam": "hf_continual.methods.recadam.method:RecAdam",
    "ewc": "hf_continual.methods.ewc:EWC",
    "o_lora": "hf_continual.methods.o_lora:OLoRA",
    "migu": "hf_continual.methods.migu:MIGU",
    "tasl": "hf_continual.methods.tasl.method:TaSL",
    "gradient_projection": "hf_continual.methods.gradient_projection:GradientProjection",
    "task_vector": "hf_continual.methods.task_vector:TaskVector",
    "l2p": "hf_continual.methods.l2p:L2P",
    "moe_lora": "hf_continual.methods.moe_lora:MoELoRA",
    "sapt_lora": "hf_continual.methods.sapt_lora:SAPTLoRA",
    "lamol": "hf_continual.methods.lamol:LAMOL",
    "lfpt5": "hf_continual.methods.lfpt5:LFPT5",
    "vrmcl": "hf_continual.methods.vrmcl:VRMCL",
    "mask_surprising": "hf_continual.methods.mask_surprising:MaskSurprising",
    "entropy_weighted": "hf_continual.methods.entropy_weighted:EntropyWeighted",
    "kl_to_base": "hf_continual.methods.kl_to_base:KLToBase",
    "on_policy_replay": "hf_continual.methods.on_policy_replay.method:OnPolicyReplay",
    "mofo": "hf_continual.methods.mofo:MoFO",
    "osft": "hf_continual.methods.osft:OSFT",
    "slao": "hf_continual.methods.slao:SLAO",
    "slow_weights": "hf_continual.methods.slow_weights:SlowWeights",
}


def method_class(name: str) -> type[Method]:
    """Find a method's class.

    Args:
        name: A key of `TABLE`, or ``"package.module:Class"`` for your own method.

    Returns:
        The class.

    Raises:
        ValueError: If there is no such name, module or class, or it is not a `Method`.
    """
    from hf_continual.methods.base import Method

    target = _target(name)
    try:
        found = imported(target)
    except ImportError as error:
        raise ValueError(f"Method {name!r} cannot be imported: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(f"{name!r} is {found!r}, not a subclass of hf_continual.Method.")
    return found


def _target(name: str) -> str:
    target = TABLE.get(name, name if ":" in name else None)
    if target is None:
        hint = did_you_mean(name, TABLE)
        raise ValueError(
            f"Unknown method {name!r}.{hint} Known are {', '.join(TABLE)}; your own method is named "
            f"'package.module:Class'."
        )
    return target


def check_description(description: Any) -> None:
    """Check the names in a description of methods without importing a method, so that a typo is reported at once.

    Args:
        description: See `build_methods`; objects and user-defined methods are not checked.

    Raises:
        TypeError: If hyper-parameters are not a mapping, or a required one is missing.
        ValueError: If a method or a hyper-parameter is unknown.
    """
    if isinstance(description, str):
        description = {description: {}}
    if isinstance(description, Mapping):
        for name, options in description.items():
            target = _target(str(name))
            if str(name) in TABLE:
                _check_options(str(name), {} if options is None else options, option_names(target))
    elif isinstance(description, Sequence):
        for item in description:
            if isinstance(item, str | Mapping):
                check_description(item)


def _check_options(name: str, options: Any, known: Mapping[str, bool]) -> None:
    """Refuse unknown hyper-parameters, and missing required ones."""
    if not isinstance(options, Mapping):
        raise TypeError(
            f"methods.{name} must be a mapping of hyper-parameters, got {type(options).__name__} "
            f"({options!r}). Known are {', '.join(known)}."
        )
    if unknown := [str(key) for key in options if key not in known]:
        hint = did_you_mean(unknown[0], known)
        raise ValueError(
            f"methods.{name} has no hyper-parameter {', '.join(map(repr, unknown))}.{hint} "
            f"Known are {', '.join(known)}."
        )
    if missing := [key for key, needed in known.items() if needed and key not in options]:
        raise TypeError(f"methods.{name} needs {missing[0]!r}: write {{{name}: {{{missing[0]}: ...}}}}.")


def build_methods(description: Any) -> list[Method]:
    """Build methods from data: a name, a mapping name -> hyper-parameters, or a list of these.

    Args:
        description: For example ``"recadam"``, ``{"freeze": {"bottom": 3}}`` or
            ``[{"replay": {"rows": "old.jsonl", "ratio": 0.1}}, "recadam"]``; None builds nothing.

    Returns:
        The methods in the order given.

    Raises:
        TypeError: If the description or a hyper-parameter has the wrong type.
        ValueError: If a name or a hyper-parameter is unknown, missing or out of range.
    """
    if description is None:
        return []
    if isinstance(description, str):
        return [build_method(description, {})]
    if isinstance(description, Mapping):
        return [build_method(str(name), options or {}) for name, options in description.items()]
    if isinstance(description, Sequence):
        return [method for item in description for method in build_methods(_item(item))]
    raise TypeError(
        f"methods must be a name, a mapping of names to hyper-parameters, or a list of these, got "
        f"{type(description).__name__} ({description!r})."
    )


def _item(item: Any) -> Any:
    if isinstance(item, str | Mapping):
        return item
    from hf_continual.methods.base import Method

    kind = " Methods built in Python go into ContinualTrainer(methods=[...])." if isinstance(item, Method) else ""
    raise TypeError(
        f"an entry of the methods list must be a name or a mapping, got {type(item).__name__} ({item!r}).{kind}"
    )


def build_method(name: str, options: Any) -> Method:
    """Build one method from its name and hyper-parameters; see `build_methods`."""
    cls = method_class(name)
    own = [f for f in fields(cls) if f.init] if is_dataclass(cls) else []
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in own}
    _check_options(name, options, known)
    hints = get_type_hints(cls)
    values = {key: _typed(f"methods.{name}.{key}", value, hints[key]) for key, value in options.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise type(error)(f"methods.{name}: {error}") from error


def _typed(where: str, value: Any, hint: Any) -> Any:
    """Check a value against a field's annotation; ``1e-3``, a string to YAML, becomes a number."""
    adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        return adapter.validate_python(value, strict=True)
    except ValidationError as strict:
        if isinstance(value, str):
            try:
                return adapter.validate_python(float(value), strict=True)
            except (ValueError, ValidationError):
                pass
        wanted = getattr(hint, "__name__", None) or str(hint).replace("typing.", "")
        said = strict.errors()[0]["msg"]
        raise TypeError(f"{where} is {value!r} ({type(value).__name__}), expected {wanted}: {said}.") from None
