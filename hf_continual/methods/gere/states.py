"""Recorded hidden states of the general samples: thresholds per channel, and two bits per unit or the full values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_continual.data import recording
from hf_continual.data.distributed import gathered, world
from hf_continual.data.recording import Recorded
from hf_continual.data.spill import Keeping
from hf_continual.methods.gere.ternary import RunningStatistics, activation_states, pack_states

SMALL = ("low", "high")


class States(Recorded):
    """An open file of states, or of hidden states, with their thresholds."""

    def row(self, index: int, tokens: int, what: str = "states") -> Tensor:
        """See `Recorded.row`; ``"states"`` (packed) or ``"hidden"``."""
        return super().row(index, tokens, what)

    @property
    def low_D(self) -> Tensor:
        """Lower thresholds."""
        return self.tensor("low")

    @property
    def high_D(self) -> Tensor:
        """Upper thresholds."""
        return self.tensor("high")


class Thresholds(Keeping):
    """Thresholds from each channel's mean and deviation over all tokens; keeps each row's states or hidden states.

    Args:
        threshold: Distance of the thresholds from the mean, in standard deviations.
        keep_hidden: Whether hidden states in bfloat16 are kept instead of their states.
    """

    small = SMALL

    def __init__(self, threshold: float, keep_hidden: bool) -> None:
        self.threshold, self.keep_hidden = threshold, keep_hidden
        self.what = "hidden" if keep_hidden else "states"
        self.statistics = RunningStatistics()
        self.low_D = self.high_D = torch.zeros(())

    def see(self, values: Tensor) -> None:
        """See the hidden states of a row."""
        self.statistics.add(values)

    def seen(self) -> dict[str, Tensor]:
        """The thresholds, over all processes' rows."""
        mean_D, std_D = _merged(self.statistics).result()
        self.low_D = (mean_D - self.threshold * std_D).cpu()
        self.high_D = (mean_D + self.threshold * std_D).cpu()
        if not (torch.isfinite(self.low_D).all() and torch.isfinite(self.high_D).all()):
            raise ValueError(
                f"The reference model's hidden states are not finite ({int((~torch.isfinite(self.low_D)).sum())} of "
                f"{self.low_D.numel()} channels), so they have no thresholds. Load it in bfloat16 or float32."
            )
        return {"low": self.low_D, "high": self.high_D}

    def keep(self, values: Tensor) -> Tensor:
        """States in 2 bits, or hidden states in bfloat16."""
        if self.keep_hidden:
            return values.to(torch.bfloat16)
        return pack_states(activation_states(values, self.low_D, self.high_D))


def open_recorded(file: Path, facts: dict[str, Any]) -> States | None:
    """Open a file of states; see `hf_continual.data.recording.open_recorded`."""
    found = recording.open_recorded(file, facts, SMALL)
    return None if found is None else States(found.file, found.offsets)


def open_whole(file: Path) -> States:
    """Open a file that was already checked."""
    return States(file, recording.open_whole(file).offsets)


def record(
    file: Path,
    facts: dict[str, Any],
    rows: Sequence[Sequence[int]],
    hidden: Callable[[Sequence[int]], Tensor],
    threshold: float,
    keep_hidden: bool = False,
    extra: Callable[[], dict[str, Tensor]] = dict,
    able: bool = True,
) -> States:
    """Record the states of rows; see `hf_continual.data.recording.record`.

    Args:
        file: Path to write to.
        facts: The facts they depend on.
        rows: Tokens of each row.
        hidden: Last hidden states (S, D) of a row's tokens.
        threshold: Distance of the thresholds from the mean, in standard deviations.
        keep_hidden: Whether hidden states in bfloat16 are kept instead of their states.
        extra: Further tensors to keep, such as a language-model head.
        able: Whether this process holds the weights.

    Returns:
        The open file.

    Raises:
        OSError: If it cannot be written.
        ValueError: If the hidden states are not finite.
    """
    keeping = Thresholds(threshold, keep_hidden)
    recording.record(file, facts, rows, hidden, keeping, extra, able, "GeRe: states of the general rows")
    return open_whole(file)


def _merged(statistics: RunningStatistics) -> RunningStatistics:
    """Statistics over all processes, merged in the order of the processes so that all get the same bits."""
    if world()[0] == 1:
        return statistics
    merged = RunningStatistics()
    own = (statistics.count, statistics.mean_D.cpu(), statistics.squares_D.cpu())
    for count, mean_D, squares_D in gathered(own):
        merged.merge(count, mean_D, squares_D)
    return merged
