"""The protocol: what a way of merging is, and all that it may see of the models.

A method gives a rule for every tensor. A rule is pure: the values of one range of elements in every model go in, and where the
range is; the merged values come out. It never sees a whole model, and where the range begins and ends must not change a bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from hf_continual.merging.rules import Rule, Rules, weights_of
from hf_continual.paper import Paper

if TYPE_CHECKING:
    from hf_continual.merging.checkpoints import Checkpoint
    from hf_continual.merging.members import Member
    from hf_continual.merging.passes import Passes

__all__ = ["MergeMethod", "Models", "Rule", "Rules", "weights_of"]


@dataclass(frozen=True)
class Models:
    """The models of a merge, opened; no value is read yet.

    Args:
        members: Models in the order in which a rule sees them: those that were named, and before them the base where the method
            counts from it.
        base: The full model that adapters sit on, or that changes are counted from; None where none was given.
        from_base: Whether the base is the first of the members.
    """

    members: tuple[Member, ...]
    base: Checkpoint | None
    from_base: bool

    @property
    def named(self) -> tuple[Member, ...]:
        """The models that the user named, oldest first."""
        return self.members[1:] if self.from_base else self.members


class MergeMethod:
    """A way of merging. Subclasses are dataclasses of their hyper-parameters.

    Class attributes:
        name: Its name in reports.
        paper: What it implements.
        from_base: Whether it counts changes from a base, which is then needed and is the first model of its rules.
        looks: Whether `prepare` reads values; it then runs under the output's lock, after every check.
        linear: Whether every rule is a weighted sum, so that adapters can be merged to an adapter.
        models: How many models it takes, least and most; None for no limit.
    """

    name: ClassVar[str]
    paper: ClassVar[Paper]
    from_base: ClassVar[bool] = False
    looks: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    models: ClassVar[tuple[int, int | None]] = (1, None)

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
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}  # pyrefly: ignore[bad-argument-type]
