"""A merge as plain data: the models, the rule that combines their tensors, and what is reported about it."""

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
    """A merge: models, and the rule that combines their tensors.

    Args:
        method: Its name in reports.
        paper: What to cite.
        members: The models whose values the rule sees, in its order.
        base: The full model that adapters sit on, if one was given.
        rule_for: Name of a tensor -> its rule.
        linear: Whether every rule is a weighted sum.
        options: What decides the result besides the models, as plain data.
        asked: The request alone, without what `options` add about results; plain data. The same request for the same
            models is the same merge.
        report: Name of the report's file.
        newest: Index of the model whose tokenizer and chat template are used.
        facts: Further entries of the report.
        outputs: Lays out the output itself, given the output options and the list of notes, or returns None.
        image: Name of a plot that may accompany the report, or None.
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
    """Digest that identifies texts or rows, for `Job.asked`."""
    if rows is None:
        return None
    seen = hashlib.sha256()
    for row in rows:
        seen.update(json.dumps(row, sort_keys=True, default=str).encode())
    return seen.hexdigest()[:32]
