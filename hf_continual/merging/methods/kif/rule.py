"""Recurrent-KIF's fusion on stored weights: passes over the scores find thresholds, then a rule fuses chunks.

The maths is in `hf_continual.tensors.fusion` and `hf_continual.tensors.importance`. A global threshold is exact
without all scores in memory: two counting passes, see `hf_continual.tensors.selection`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from hf_continual.merging.engine.chunks import Chunk
from hf_continual.merging.errors import MergeError
from hf_continual.merging.inputs.pieces import PIECE, pieces_of
from hf_continual.merging.inputs.safetensors_file import Files
from hf_continual.merging.methods.kif.scores import SIDES, Scores, Side
from hf_continual.tensors.fusion import WEIGHTS, MaskRule, adaptive_weights, blend, mask_weights
from hf_continual.tensors.importance import Scope, scores, share_rank
from hf_continual.tensors.selection import kth_smallest

FuseRule = Literal["code", "paper", "no_shared", "adaptive", "weighted"]
FUSE_RULES = (*WEIGHTS, "adaptive", "weighted")
GROUPS = ("both", "new_only", "old_only", "neither")

# Bytes: a counting pass takes six int64 of a piece, its stored scores and its counters, and ends before anything is
# written; fusing takes sixteen float32 and the masks.
SCRATCH = PIECE * 96 + 4 * 2**20


@dataclass(frozen=True)
class Choice:
    """How sides are weighed; the fields are those of `hf_continual.kif_fuse`."""

    rule: FuseRule
    top_share: float
    scope: Scope
    temperature: float


@dataclass
class Weighing:
    """The results of the passes over the scores, and the weights that follow from them.

    Args:
        choice: The rule.
        thresholds: Tensor -> values that the top fraction of the new and the old side is strictly above.
        ranges: Smallest and largest score of each side, for ``"adaptive"``.
        shares: Tensor -> weight of the new side, for ``"weighted"``; the same everywhere, or one per tensor with scope "tensor".
        counts: Tensor -> elements by `GROUPS`, or the mean weight of the new side if the rule has no masks.
    """

    choice: Choice
    thresholds: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    ranges: tuple[tuple[Tensor, Tensor], ...] = ()
    shares: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, list[float]] = field(default_factory=dict)

    def masks(self, name: str, new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """Elements that matter to each side."""
        of_new, of_old = self.thresholds[name]
        return new > of_new, old > of_old

    def weights(self, name: str, new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """w_in and w_out of a piece of a tensor.

        Args:
            name: The tensor.
            new: Scores of the new side.
            old: Scores of the old side.

        Returns:
            The weights of the two movements.
        """
        rule = self.choice.rule
        if rule == "weighted":
            return self.shares[name], 1 - self.shares[name]
        if rule == "adaptive":
            z_new, z_old = (
                ((s - low) / (high - low)).nan_to_num(0.0)
                for s, (low, high) in zip((new, old), self.ranges, strict=True)
            )
            return adaptive_weights(z_new, z_old, self.choice.temperature)
        mask_rule: MaskRule = rule
        return mask_weights(*self.masks(name, new, old), mask_rule)


class FuseChunk:
    """The chunk function: values of base, new and (if given) old, then the scores of both sides.

    Args:
        weighing: Gives the weights.
        sides: Scores of both sides.
        old_from: Index of the model that old was trained from, 0 (base) or 1 (new); None if there is no old.
    """

    def __init__(self, weighing: Weighing, sides: Mapping[Side, Scores], old_from: int | None) -> None:
        self._weighing, self._sides, self._old_from = weighing, sides, old_from

    def __call__(self, chunk: Chunk) -> Tensor:
        models = 2 if self._old_from is None else 3
        base_all = chunk.values[0]
        for first in range(0, chunk.stop - chunk.start, PIECE):
            values = [v[first : first + PIECE] for v in chunk.values]
            new, old = scores_of(values[models:], self._sides)
            w_in, w_out = self._weighing.weights(chunk.name, new, old)
            base, tuned = values[:2]
            moved = torch.zeros(()) if self._old_from is None else values[2] - values[self._old_from]
            base.copy_(blend(base, tuned - base, moved, w_in, w_out))
        return base_all


def scores_of(values: Sequence[Tensor], sides: Mapping[Side, Scores]) -> list[Tensor]:
    """The scores of the sides, in order, from their stored tensors."""
    found, at = [], 0
    for side in SIDES:
        if side in sides:
            number = sides[side].number
            stored = [v.float() for v in values[at : at + number]]
            spread = stored[1] if number == 2 else None
            found.append(scores(stored[0], spread) if sides[side].averages else stored[0])
            at += number
    return found


def pieces(sides: Mapping[Side, Scores], names: Sequence[str]) -> Iterator[tuple[str, list[Tensor]]]:
    """Scores of some tensors, a piece of elements at a time.

    Args:
        sides: Scores of one side or both.
        names: The tensors.

    Yields:
        Name of the tensor, and a piece of the scores of each side.

    Raises:
        MergeError: If a score is not finite.
    """
    here = [side for side in SIDES if side in sides]
    with Files() as files:
        for name in names:
            for values in pieces_of([t for side in here for t in sides[side].tensors[name]], files):
                found = scores_of(values, sides)
                for side, score in zip(here, found, strict=True):
                    if not bool(torch.isfinite(score).all()):
                        raise MergeError(
                            f"importance of the {side} side is not finite in {name!r}; such scores cannot be ranked. "
                            f"Measure it again, or leave out the broken step."
                        )
                yield name, found


def weigh(choice: Choice, sides: Mapping[Side, Scores]) -> Weighing:
    """Find thresholds or ranges, and count which elements go to which side.

    Args:
        choice: The rule.
        sides: Scores of both sides, of the same tensors.

    Returns:
        What was found.

    Raises:
        MergeError: If a score is not finite, or the sides cannot be compared.
    """
    names = list(sides["new"].tensors)
    sizes = {n: t[0].numel for n, t in sides["new"].tensors.items()}
    found = Weighing(choice)
    if choice.rule in WEIGHTS:
        groups = [[n] for n in names if sizes[n]] if choice.scope == "tensor" else [names]
        for group in groups:
            rank = share_rank(sum(sizes[n] for n in group), choice.top_share)
            of_new, of_old = (_threshold(sides, side, group, rank) for side in SIDES)
            found.thresholds |= dict.fromkeys(group, (of_new, of_old))
    elif choice.rule == "adaptive":
        found.ranges = tuple(_range(sides, side, names) for side in SIDES)
    else:
        found.shares = _shares(sides, names, choice.scope)
    totals: dict[str, Tensor] = {n: torch.zeros(4 if choice.rule in WEIGHTS else 1, dtype=torch.float64) for n in names}
    for name, (new, old) in pieces(sides, names):
        if choice.rule in WEIGHTS:
            m_in, m_out = found.masks(name, new, old)
            both = [m_in & m_out, m_in & ~m_out, m_out & ~m_in, ~(m_in | m_out)]
            totals[name] += torch.stack([m.sum() for m in both])
        else:
            w_in, _ = found.weights(name, new, old)
            totals[name] += w_in.double().expand(new.shape).sum()
    found.counts = {n: t.tolist() for n, t in totals.items()}
    return found


def _threshold(sides: Mapping[Side, Scores], side: Side, names: Sequence[str], rank: int) -> Tensor:
    return kth_smallest(lambda: (score for _, (score,) in pieces({side: sides[side]}, names)), rank)


def _range(sides: Mapping[Side, Scores], side: Side, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    ends = [torch.stack(torch.aminmax(score)) for _, (score,) in pieces({side: sides[side]}, names)]
    both = torch.stack(ends)
    return both[:, 0].min(), both[:, 1].max()


def _shares(sides: Mapping[Side, Scores], names: Sequence[str], scope: Scope) -> dict[str, Tensor]:
    """The new side's fraction of the summed scores, over all tensors together or over each."""
    forms = [(s.averages, s.number) for s in sides.values()]
    if forms[0] != forms[1]:
        raise MergeError(
            f"rule='weighted' compares the sums of both sides, but their scores are of two kinds: "
            f"{' and '.join(str(dict(s.facts).get('score')) for s in sides.values())}. Give both as states, or both as scores."
        )
    sums = {n: torch.zeros(2, dtype=torch.float64) for n in names}
    for name, both in pieces(sides, names):
        sums[name] += torch.stack([score.double().sum() for score in both])
    if scope == "global":
        sums = dict.fromkeys(names, torch.stack(list(sums.values())).sum(0))
    # If nothing was measured on either side, both count equally.
    return {n: (s[0] / s.sum() if float(s.sum()) > 0 else torch.tensor(0.5)).float() for n, s in sums.items()}
