"""The protocol of a merge method, and all that a method may see of the models.

A method returns a rule for every tensor. A rule is pure: its inputs are the values of one range of elements in every model and
the range's position, its output the merged values. It never sees a whole model, and the limits of a range must not change a bit.
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
    """The opened models of a merge; no value is read yet.

    Args:
        members: Models in the order in which a rule sees them: those that were named, preceded by the base if the method
            measures changes from it.
        base: The full model that adapters belong to, or that changes are measured from; None if not given.
        from_base: Whether the base is the first of the members.
        newest: Index of the model whose tokenizer and chat template are used.
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
    """A merge method. Subclasses are dataclasses of their hyper-parameters.

    A merge works on a new object with the same hyper-parameters, so results of a hook may be kept in fields that are not
    parameters (``field(init=False)``). The hooks are called in the order below. Most methods only need
    `prepare`; the hooks after `describe` are for methods that are more than one rule per tensor.

    Class attributes:
        name: Its name in reports.
        paper: The paper that it implements.
        from_base: Whether it measures changes from a base, which is then required and comes first in its rules.
        looks: Whether `prepare` reads values; it then runs under the output's lock, after every check.
        linear: Whether every rule is a weighted sum, so that adapters can be merged to an adapter.
        models: Minimum and maximum number of models; None for no limit.
        report: Name of its report.
        image: Name of the plot that `evidence` draws, which the model card then shows.
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
        """Open the named models; a method overrides this if its models are more than a list on a base. Only headers are read."""
        from hf_continual.merging.inputs.members import (  # imports torch, which the table of merges does not need
            Member,
            open_members,
        )

        members, full = open_members(models, base, output.quantized_base)
        first = [Member(full)] if self.from_base and full is not None else []
        return Models((*first, *members), full, self.from_base)

    def check(self, models: Models) -> None:
        """Refuse models that the method cannot take with a `ValueError` that states what to do; no value is read yet."""

    def prepare(self, models: Models, passes: Passes) -> Rules:
        """Return the rules: a function from a tensor's name to its rule.

        A method that `looks` first makes passes over values; the results are kept, so that an interrupted merge does not repeat
        them. It is not called in a dry run.
        """
        raise NotImplementedError

    def facts(self) -> Mapping[str, Any]:
        """Results of `prepare`, for the report; plain data."""
        return {}

    def describe(self, models: Models) -> dict[str, Any]:
        """Hyper-parameters as applied to these models, plain data: with the inputs they determine the output's bytes."""
        return {name: getattr(self, name) for name in hyper_parameters(type(self))}

    def asked(self, models: Models) -> Mapping[str, Any]:
        """Plain data that identifies this call among calls on the same models, if `describe` omits inputs or includes results;
        a finished merge with the same request is not repeated."""
        return self.describe(models)

    def known(self, models: Models) -> Mapping[str, Any]:
        """Entries of the report that are known before `prepare`, including in a dry run."""
        return {}

    def outputs(self, output: Output, notes: list[str]) -> list[OutputTensor] | None:
        """The output's tensors, for a method that needs more than the models' values or combines adapters factor by factor.

        Called before `prepare`, for the plan, and after it. None: each tensor is made by its rule.
        """
        return None

    def evidence(self, out: Path) -> None:
        """Write further files, such as a plot of the results, into the output before it is published."""

    def result(self, done: MergeResult, models: Models) -> MergeResult:
        """The result for the caller, if the method returns more than every merge does."""
        return done
