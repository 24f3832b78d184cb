"""Several methods used as one, and error messages for conflicts between them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hf_continual.bounds import plain_name
from hf_continual.data.kept import FRESH
from hf_continual.methods.base import Method
from hf_continual.methods.table import TABLE, method_class
from hf_continual.paper import Paper
from hf_continual.plain import hyper_parameters

logger = logging.getLogger(__name__)

STATIONS = {
    "adapter": "own modules",
    "replay": "rows",
    "prepare_model": "model surgery",
    "prepare": "before training",
    "edit_rows": "rows",
    "optimizer": "optimizer",
    "begin_step": "before a step",
    "weigh_tokens": "token weights",
    "loss_terms": "loss terms",
    "after_forward": "after forward",
    "edit_gradients": "gradients",
    "after_step": "after step",
    "end_step": "after step",
    "end_task": "task end",
    "task_state": "task end",
}


def hooks(method: type[Method]) -> list[str]:
    """The hooks that a method overrides, in the order in which a step calls them."""
    names = [title for call, title in STATIONS.items() if overrides(method, call)]
    return list(dict.fromkeys(names))


def overrides(method: type[Method], call: str) -> bool:
    """Whether a method overrides a hook."""
    return getattr(method, call) is not getattr(Method, call)


def check_heirs(left: Iterable[tuple[str, str, str]], methods: Methods, where: str) -> None:
    """Refuse to continue without a method that left something for this task.

    Args:
        left: Name, kind and size (as text) of each method that left something.
        methods: The methods of this task.
        where: The model they left it with, for messages.

    Raises:
        ValueError: If one is missing, or is of another kind.
    """
    here = {name: kind for name, kind, _ in methods.kinds()}
    for name, kind, size in left:
        # Only kinds of the table are looked up: the list may be someone else's, and a lookup imports what it names.
        if name not in here and kind in TABLE and method_class(kind).droppable:
            logger.warning(
                "%s comes with what method %r learned, and this run does not use that method: it is dropped.",
                where,
                name,
            )
        elif here.get(name) != kind:
            has = f"a {here[name]!r} of that name" if name in here else ", ".join(here) or "none"
            raise ValueError(
                f"{where} comes with what method {name!r} (a {kind!r}{size}) learned, and this run has {has}: it would be "
                f"lost. Give the run that method, or start without what was learned: {FRESH}."
            )


def kind_of(method: type[Method]) -> str:
    """A method's name in plain data: its key in the table, or ``"package.module:Class"``."""
    path = f"{method.__module__}:{method.__qualname__}"
    return next((name for name, target in TABLE.items() if target == path), path)


def check_protocol(method: type[Method]) -> None:
    """Refuse a class that would fail only during a run, or when its task is saved.

    Args:
        method: A subclass of `Method`.

    Raises:
        TypeError: If it lacks a name, its paper is not a `Paper`, or a hook takes other arguments.
    """
    title = method.__name__
    if not isinstance(getattr(method, "name", None), str | property) and "name" not in getattr(
        method, "__dataclass_fields__", {}
    ):
        raise TypeError(
            f"{title} has no name: write `name = {title.lower()!r}` in the class. Logs, files and cards use it."
        )
    if not isinstance(method.paper, Paper | None):
        raise TypeError(
            f"{title}.paper is {method.paper!r} ({type(method.paper).__name__}): give a hf_continual.Paper(title, authors, year), "
            f"or None for an unpublished idea."
        )
    for call in STATIONS:
        if overrides(method, call):
            _check_call(method, call)


def check_described(method: Method) -> None:
    """Refuse a method whose hyper-parameters cannot be saved with the model.

    Args:
        method: The method.

    Raises:
        TypeError: If it takes a hyper-parameter that it does not keep under the same name.
    """
    if type(method).describe is not Method.describe:
        return
    if lost := [name for name in hyper_parameters(type(method)) if not hasattr(method, name)]:
        title = type(method).__name__
        raise TypeError(
            f"{title} takes the hyper-parameter {lost[0]!r} and has no attribute of that name, so it could not be saved with the "
            f"model: write @dataclass above the class and declare it as a field, or keep it as self.{lost[0]}."
        )


def _check_call(method: type[Method], call: str) -> None:
    """Refuse an override that cannot be called like the hook."""
    wanted = list(inspect.signature(getattr(Method, call)).parameters)
    try:
        inspect.signature(getattr(method, call)).bind(*wanted)
    except TypeError as error:
        raise TypeError(
            f"{method.__name__}.{call}{inspect.signature(getattr(method, call))} cannot be called as {call}({', '.join(wanted)}): "
            f"{error}. Give it these parameters."
        ) from None


class Methods:
    """The methods of one run, checked to fit together.

    Args:
        methods: In the order in which they edit gradients and weights.

    Raises:
        TypeError: If an entry is not a method.
        ValueError: If two have the same name, or two supply an optimizer, their own modules, or `begin_step`.
    """

    def __init__(self, methods: Iterable[Method]) -> None:
        if isinstance(methods, Method):
            name = type(methods).__name__
            raise TypeError(f"methods is a single {name}, and it must be a list: methods=[{name}(...)].")
        if isinstance(methods, str | Mapping):
            raise TypeError(
                f"methods={methods!r} describes methods as data, and here they must be objects. Give it to the configuration: "
                f"ContinualConfig(methods={methods!r})."
            )
        self.methods = tuple(sorted(methods, key=lambda method: bool(getattr(method, "watches", False))))
        for method in self.methods:
            if isinstance(method, type) and issubclass(method, Method):
                raise TypeError(
                    f"methods holds the class {method.__name__}; put an object there: {method.__name__}(...)."
                )
            if not isinstance(method, Method):
                raise TypeError(
                    f"methods must hold hf_continual methods, got {type(method).__name__} ({method!r}). "
                    f"A description as data belongs in ContinualConfig(methods=...)."
                )
            check_protocol(type(method))
            check_described(method)
        names = [method.name for method in self.methods]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"Two methods are called {twice[0]!r}: their logs and state would overwrite each other. "
                f"Drop one, or rename one if the method has a `name` parameter."
            )
        for method in self.methods:
            plain_name(type(method).__name__, method.name)
        bringing = [m for m in self.methods if overrides(type(m), "optimizer")]
        if len(bringing) > 1:
            both = " and ".join(type(m).__name__ for m in bringing)
            raise ValueError(f"{both} both supply an optimizer, and a run can have only one. Drop one of them.")
        self.optimizing: Method | None = bringing[0] if bringing else None
        adapting = [m for m in self.methods if overrides(type(m), "adapter")]
        if len(adapting) > 1:
            both = " and ".join(type(m).__name__ for m in adapting)
            raise ValueError(
                f"{both} both supply their own modules, and a model can have those of only one. Drop one of them."
            )
        self.adapting: Method | None = adapting[0] if adapting else None
        if len(leading := self.at("begin_step")) > 1:
            both = " and ".join(type(m).__name__ for m in leading)
            raise ValueError(
                f"{both} both act before the passes of a step and may move the weights for them, so neither would see those of the "
                f"step. Drop one of them."
            )

    def __iter__(self) -> Iterator[Method]:
        return iter(self.methods)

    def __len__(self) -> int:
        return len(self.methods)

    @property
    def acting(self) -> tuple[Method, ...]:
        """The methods that change how the model learns, without those that only watch."""
        return tuple(m for m in self.methods if not m.watches)

    def at(self, call: str) -> list[Method]:
        """The methods that override a hook."""
        return [m for m in self.methods if overrides(type(m), call)]

    @property
    def taps(self) -> tuple[str, ...]:
        """All requested module outputs, each once."""
        return tuple(dict.fromkeys(name for m in self.methods for name in m.taps))

    def kinds(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Name, kind and hyper-parameters of each method; a kind is a key of the table or ``"package.module:Class"``."""
        return [(m.name, kind_of(type(m)), m.describe()) for m in self.acting]

    def describe(self) -> list[dict[str, Any]]:
        """The methods as data, in order, from which they can be rebuilt: ``[{kind: hyper-parameters}, ...]``."""
        return [{kind_of(type(m)): m.describe()} for m in self.acting]
