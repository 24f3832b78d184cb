"""A merge as plain data: models, the rule that makes one tensor of theirs, and what is told about it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_continual.merging.engine.chunks import OutputTensor
from hf_continual.merging.engine.options import Output
from hf_continual.merging.engine.rules import Rules
from hf_continual.merging.inputs.checkpoint import Checkpoint
from hf_continual.merging.inputs.members import Member
from hf_continual.paper import Paper


@dataclass(frozen=True)
class Job:
    """A merge: models, and the rule that makes one tensor of theirs.

    Args:
        method: Its name in reports.
        paper: What to cite.
        members: The models whose values the rule sees, in its order.
        base: The full model that adapters sit on, if one was given.
        rule_for: Name of a tensor -> its rule.
        linear: Whether every rule is a weighted sum.
        options: What decides the result beside the models, as plain data.
        asked: What was asked for, where `options` also tell what was found; plain data. The same models, asked for the same,
            are the same merge.
        report: Name of the report's file.
        newest: Place of the model that gives tokenizer and chat template.
        facts: Further entries of the report.
        outputs: Lays the output out itself, told how it is written and where notes go, or gives None.
        image: Name of the picture that may lie beside the report, or None.
    """

    method: str
    paper: Paper
    members: Sequence[Member]
    base: Checkpoint | None
    rule_for: Rules
    linear: bool
    options: Mapping[str, Any]
    asked: Mapping[str, Any]
    report: str
    newest: int = -1
    facts: Mapping[str, Any] = field(default_factory=dict)
    outputs: Callable[[Output, list[str]], list[OutputTensor] | None] = lambda output, notes: None
    image: str | None = None


def digest_of(rows: Any) -> str | None:
    """What tells texts or rows apart, for `Job.asked`."""
    if rows is None:
        return None
    seen = hashlib.sha256()
    for row in rows:
        seen.update(json.dumps(row, sort_keys=True, default=str).encode())
    return seen.hexdigest()[:32]
