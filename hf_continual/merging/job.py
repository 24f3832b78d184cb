"""A merge as plain data: models, the rule that makes one tensor of theirs, and what is told about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_continual.merging.checkpoints import Checkpoint
from hf_continual.merging.chunks import OutputTensor
from hf_continual.merging.members import Member
from hf_continual.merging.options import Output
from hf_continual.merging.rules import Rule, weights_of
from hf_continual.paper import Paper

REPORT = "merge_report.json"


@dataclass(frozen=True)
class Job:
    """A merge: models, and the rule that makes one tensor of theirs.

    Args:
        method: Its name in reports.
        paper: What to cite.
        members: The models whose values the rule sees, in its order.
        base: The full model that adapters sit on, if one was given.
        rule_for: Name of a tensor -> its rule.
        options: What decides the result beside the models, as plain data.
        newest: Place of the model that gives tokenizer and chat template.
        report: Name of the report's file.
        facts: Further entries of the report.
        evidence: Writes further files, told the output folder.
        tensors: Lays the output out itself, told how it is written and where notes go. The models may then be adapters
            that are combined element by element, as tensors of their own and not as what they do to a base.
        linear: Whether every rule is a weighted sum; None: as the rule of the first tensor is.
        asked: What was asked for, where `options` also tell what was found; plain data. The same models, asked for the same,
            are the same merge.
        image: Name of the picture of the weights that `evidence` draws, or None.
    """

    method: str
    paper: Paper
    members: Sequence[Member]
    base: Checkpoint | None
    rule_for: Callable[[str], Rule]
    options: Mapping[str, Any]
    newest: int = -1
    report: str = REPORT
    facts: Mapping[str, Any] = field(default_factory=dict)
    evidence: Callable[[Path], None] | None = None
    tensors: Callable[[Output, list[str]], list[OutputTensor]] | None = None
    image: str | None = None
    linear: bool | None = None
    asked: Mapping[str, Any] | None = None

    @property
    def is_linear(self) -> bool:
        """Whether the result can be an adapter."""
        if self.linear is not None:
            return self.linear
        return weights_of(self.rule_for(next(n for m in self.members for n in m.names))) is not None
