"""What a diagnosis found, as data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_continual.atomic_files import write_json
from hf_continual.intervals import Interval

Verdict = Literal["spurious", "real", "none", "undecided"]


@dataclass(frozen=True)
class Difference:
    """How much one score of the held rows exceeds another.

    Args:
        difference: Mean over the rows.
        interval: What chance can have done to it; None where the rows say nothing about that.
        p_value: Of a paired test that it is 0; None where it is of three scores.
    """

    difference: float
    interval: Interval | None
    p_value: float | None = None


@dataclass(frozen=True)
class Judgement:
    """A verdict with what it rests on.

    Args:
        verdict: spurious, real, none or undecided.
        reason: Why, in a sentence or two.
        confidence: Share of resamples of the held rows in which the same verdict's conditions hold; of undecided the share in
            which no verdict's do.
        tests: The paired tests of the held rows by name, see `hf_continual.diagnosis.verdict`.
    """

    verdict: Verdict
    reason: str
    confidence: float
    tests: Mapping[str, Difference]


@dataclass(frozen=True)
class Remedy:
    """Something to do.

    Args:
        what: In a few words.
        why: What in the evidence speaks for it.
        command: The command; words in capitals are to be filled in.
    """

    what: str
    why: str
    command: str


@dataclass(frozen=True)
class Diagnosis:
    """The change of old rows between two checkpoints.

    Args:
        verdict: ``"spurious"``: most of what was lost comes back on rows that are not shown, and more than a fresh learner knows of
            them. ``"real"``: no more comes back than a fresh learner knows. ``"none"``: nothing was forgotten. ``"undecided"``:
            the rows do not show which.
        reason: Why, in a sentence or two.
        confidence: Share of resamples of the held rows in which the same verdict's conditions hold.
        scores: Score of the held rows (never shown), and of the shown ones, by moment: before, after, recovered, base, control.
        tests: Paired tests of the held rows.
        recovery: Score of the held rows by step of the short training, of AFTER and of the control.
        layers: Per layer: angle between the two weight updates, their size, and how alike the hidden states stayed.
        line: Loss and score of the held rows along the line from BEFORE to AFTER.
        remedies: What to do, most promising first.
        notes: What could not be done, and why.
        settings: How it was done.
    """

    verdict: Verdict
    reason: str
    confidence: float
    scores: Mapping[str, Mapping[str, Any]]
    tests: Mapping[str, Difference]
    recovery: Mapping[str, Mapping[int, float]]
    layers: Sequence[Mapping[str, Any]]
    line: Sequence[Mapping[str, float]]
    remedies: Sequence[Remedy]
    notes: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return {"format": 1, **asdict(self)}

    def write(self, file: str | os.PathLike[str]) -> None:
        """Write it as JSON, whole or not at all."""
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.to_dict())
