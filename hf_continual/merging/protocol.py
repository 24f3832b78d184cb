"""The protocol: what a way of merging is, and all that it may see of the models.

A method gives a rule for every tensor. A rule is pure: the values of one range of elements in every model go in, and where the
range is; the merged values come out. It never sees a whole model, and where the range begins and ends must not change a bit.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hf_continual.merging.engine.rules import Rules
from hf_continual.paper import Paper
from hf_continual.plain import hyper_parameters

if TYPE_CHECKING:
    from hf_continual.merging.engine.chunks import OutputTensor
    from hf_continual.merging.engine.options import Output
    from hf_continual.merging.engine.passes import Passes
    from hf_continual.merging.engine.result import MergeResult
    from hf_continual.merging.inputs.checkpoint import Checkpoint
    from hf_continual.merging.inputs.members import Member


@dataclass(frozen=True)
class Models:
    """The models of a merge, opened; no value is read yet.

    Args:
        members: Models in the order in which a rule sees them: those that were named, and before them the base where the method
            counts from it.
        base: The full model that adapters sit on, or that changes are counted from; None where none was given.
        from_base: Whether the base is the first of the members.
        newest: Place of the model that gives tokenizer and chat template.
    """

    members: tuple[Member, ...]
    base: Checkpoint | None
    from_base: bool
    newest: int = -1

    @property
    def named(self) -> tuple[Member, ...]:
        """The models that the user named, oldest first."""
        return self.members[1:] if self.from_base else self.members


@dataclass
class MergeMethod:
    """A way of merging. Subclasses are dataclasses of their hyper-parameters.

    A merge works on a new object with the same hyper-parameters, so what a hook finds may be kept in fields that are no
    parameters (``field(init=False)``). The hooks are called in the order in which they stand here. Most methods need
    `prepare` alone; those behind `describe` are for methods that are more than one rule for each tensor.

    Class attributes:
        name: Its name in reports.
        paper: What it implements.
        from_base: Whether it counts changes from a base, which is then needed and is the first model of its rules.
        looks: Whether `prepare` reads values; it then runs under the output's lock, after every check.
        linear: Whether every rule is a weighted sum, so that adapters can be merged to an adapter.
        models: How many models it takes, least and most; None for no limit.
        report: Name of its report.
        image: Name of the picture that `evidence` draws, which the model card then shows.
    """

    name: ClassVar[str]
    paper: ClassVar[Paper]
    from_base: ClassVar[bool] = False
    looks: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    models: ClassVar[tuple[int, int | None]] = (1, None)
    report: ClassVar[str] = "merge_report.json"
    image: ClassVar[str | None] = None

    def open(
        self, models: Sequence[str | os.PathLike[str]], base: str | os.PathLike[str] | None, output: Output
    ) -> Models:
        """Open what was named, for a method to which models are more than a list on a base; only headers are read."""
        from hf_continual.merging.inputs.members import (  # torch, which the table of merges does not need
            Member,
            open_members,
        )

        members, full = open_members(models, base, output.quantized_base)
        first = [Member(full)] if self.from_base and full is not None else []
        return Models((*first, *members), full, self.from_base)

    def check(self, models: Models) -> None:
        """Refuse models that the method cannot take with a `ValueError` that says what to do; no value is read yet."""

    def prepare(self, models: Models, passes: Passes) -> Rules:
        """The rule of each tensor, by its name.

        A method that `looks` first makes passes over values; what it finds is kept, so that an interrupted merge does not look
        again. In a dry run it is not called.
        """
        raise NotImplementedError

    def facts(self) -> Mapping[str, Any]:
        """What `prepare` found, for the report; plain data."""
        return {}

    def describe(self, models: Models) -> dict[str, Any]:
        """Hyper-parameters as they act on these models, plain data: with the inputs they decide the output's bytes."""
        return {name: getattr(self, name) for name in hyper_parameters(type(self))}

    def asked(self, models: Models) -> Mapping[str, Any]:
        """What tells this call from another on the same models, plain data, where `describe` leaves inputs out or tells what
        was found; a finished merge that was asked for the same is not made again."""
        return self.describe(models)

    def known(self, models: Models) -> Mapping[str, Any]:
        """Entries of the report that are known before `prepare`, also in a dry run."""
        return {}

    def outputs(self, output: Output, notes: list[str]) -> list[OutputTensor] | None:
        """The output's tensors, of a method that needs more than the models' values or combines adapters factor by factor.

        Called before `prepare`, for the plan, and after it. None: each tensor is made by its rule.
        """
        return None

    def evidence(self, out: Path) -> None:
        """Write further files, such as a picture of what was found, into the output before it is published."""

    def result(self, done: MergeResult, models: Models) -> MergeResult:
        """What the caller gets, of a method that tells more than every merge."""
        return done
