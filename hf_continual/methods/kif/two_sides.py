"""State of an inner and an outer learner of the same weights: importance on both sides, and their fusion in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_continual.tensors.flat import Bucket, Flat
from hf_continual.tensors.fusion import WEIGHTS, adaptive_weights, blend, mask_weights
from hf_continual.tensors.importance import Order, Scope, record_step_, scores, share_rank, share_threshold
from hf_continual.tensors.selection import kth_smallest

Rule = Literal["code", "paper", "no_shared", "adaptive", "weighted", "sum"]
RULES = ("code", "paper", "no_shared", "adaptive", "weighted", "sum")


@dataclass(frozen=True)
class Fusion:
    """How importance is measured and movements are fused; the fields are those of `hf_continual.KIF`."""

    rule: Rule
    top_share: float
    scope: Scope
    beta1: float
    beta2: float
    order: Order
    uncertainty: bool
    temperature: float


class TwoSides:
    """Five float32 buffers over the trainable weights: the anchor, and two averages for each side.

    Buffers are reused: once the inner steps are done, their averages are only needed as scores, so the
    weights reached by then replace one of them and the scores the other.

    Args:
        flat: Layout of the weights.
        fusion: How to measure and fuse.
        add_up: Sums over processes if they hold different shards of the weights, else None.
    """

    def __init__(self, flat: Flat, fusion: Fusion, add_up: Callable[[Tensor], Tensor] | None = None) -> None:
        self.flat, self.fusion, self.add_up = flat, fusion, add_up
        self.anchor = flat.zeros()
        self.inner = [flat.zeros() for _ in range(1 + fusion.uncertainty)]
        self.outer = [flat.zeros() for _ in range(1 + fusion.uncertainty)]
        self.mask_in: Tensor | None = None
        self.left_out = torch.zeros((), device=flat.device)
        self.total = flat.size
        if add_up is not None:
            self.total = int(add_up(torch.tensor(flat.size, device=flat.device)))
        flat.copy_weights(self.anchor)

    def buffers(self) -> dict[str, Tensor]:
        """Everything kept, by name."""
        names = ("importance", "uncertainty")
        sides = {"inner": self.inner, "outer": self.outer}
        kept = {f"{side}.{name}": b for side, held in sides.items() for name, b in zip(names, held, strict=False)}
        return {"anchor": self.anchor, **kept}

    def kept(self) -> list[Tensor]:
        """All tensors kept now, including the mask."""
        return [*self.buffers().values(), *(() if self.mask_in is None else (self.mask_in,))]

    @torch.no_grad()
    def record(self, side: list[Tensor]) -> None:
        """Add a step's gradients to the averages of a side; a step that is not finite changes nothing.

        Args:
            side: `inner` or `outer`.
        """
        f, spread = self.fusion, side[1] if self.fusion.uncertainty else None
        valid = record_step_(self.flat, side[0], spread, f.beta1, f.beta2, f.order, self.add_up)
        self.left_out += (~valid).float()

    @torch.no_grad()
    def end_inner(self) -> None:
        """End the inner steps: select the weights that matter to them, and remember the weights."""
        kept = self.inner[-1]
        self._score(self.inner, kept)
        if self.fusion.rule in WEIGHTS:
            self.mask_in = self._top(lambda bucket: bucket.of(kept))
        if self.fusion.uncertainty or self.mask_in is not None:
            self.middle = self.inner[0]
        else:
            self.middle = self.flat.zeros()
        self.flat.copy_weights(self.middle)

    def _score(self, side: list[Tensor], out: Tensor) -> None:
        """Write a side's scores into a buffer, which may be its own; by bucket, since factors are scaled in copies."""
        for bucket in self.flat.buckets:
            spread = bucket.of(side[1]) if self.fusion.uncertainty else None
            scores(bucket.of(side[0]), spread, out=bucket.of(out))

    def _top(self, score: Callable[[Bucket], Tensor]) -> Tensor:
        """Mask of the top fraction by the scores of each bucket, which are computed more than once."""
        share, add_up, buckets = self.fusion.top_share, self.add_up, self.flat.buckets
        mask = torch.empty(self.flat.size, dtype=torch.bool, device=self.flat.device)
        if self.fusion.scope == "global":
            counted = (lambda counts: counts) if add_up is None else add_up
            found = kth_smallest(lambda: map(score, buckets), share_rank(self.total, share), counted)
            threshold = found.to(self.flat.device)
            for bucket in buckets:
                torch.gt(score(bucket), threshold, out=bucket.of(mask))
            return mask
        for bucket in buckets:
            scores_of = score(bucket)
            for name in bucket.names:
                start, stop = self.flat.spans[name]
                part = scores_of[start - bucket.start : stop - bucket.start]
                if add_up is not None or part.numel():
                    mask[start:stop] = part > share_threshold(part, share, self.flat.params[name].numel(), add_up)
        return mask

    def _score_out(self, bucket: Bucket) -> Tensor:
        return scores(bucket.of(self.outer[0]), bucket.of(self.outer[1]) if self.fusion.uncertainty else None)

    @torch.no_grad()
    def fuse(self) -> dict[str, Tensor]:
        """Fuse in place, make the result the new anchor, and forget the inner averages.

        Returns:
            Fractions of the elements by side (``both``, ``in_only``, ``out_only``, ``neither``), or the mean weight of
            the inner side (``inner_weight``) if the rule has no masks.
        """
        f, totals = self.fusion, torch.zeros(4, device=self.flat.device)
        mask_out = self._mask_out() if f.rule in WEIGHTS else None
        soft = None if mask_out is not None else self._soft()
        for bucket in self.flat.buckets:
            if mask_out is not None:
                assert self.mask_in is not None
                m_in, m_out = bucket.of(self.mask_in), bucket.of(mask_out)
                w_in, w_out = mask_weights(m_in, m_out, f.rule)  # pyrefly: ignore[bad-argument-type]
                counts = [m_in & m_out, m_in & ~m_out, ~m_in & m_out, ~(m_in | m_out)]
                totals += torch.stack([m.sum() for m in counts])
            else:
                assert soft is not None
                w_in, w_out = soft(bucket)
                totals[0] += w_in.sum()
            anchor, middle, now = bucket.of(self.anchor), bucket.of(self.middle), self.flat.weights(bucket)
            self.flat.write(bucket, blend(anchor, middle - anchor, now - middle, w_in, w_out))
            # Read back from the weights: in low precision they were rounded.
            anchor.copy_(self.flat.weights(bucket))
        for buffer in self.inner:
            buffer.zero_()
        self.mask_in = None
        totals = (totals if self.add_up is None else self.add_up(totals)) / self.total
        if f.rule in WEIGHTS:
            return dict(zip(("both", "in_only", "out_only", "neither"), totals, strict=True))
        return {"inner_weight": totals[0]}

    def _mask_out(self) -> Tensor:
        if not self.fusion.uncertainty:
            return self._top(self._score_out)
        # The inner scores have become a mask, so their buffer is free for the outer ones.
        values = self.inner[-1]
        self._score(self.outer, values)
        return self._top(lambda bucket: bucket.of(values))

    def _soft(self) -> Callable[[Bucket], tuple[Tensor, Tensor]]:
        """Weights of a bucket if the rule has no masks."""
        score_in, buckets = self.inner[-1], self.flat.buckets
        if self.fusion.rule == "weighted":
            return self._shares(score_in)
        low_in, high_in = self._range(lambda: [score_in])
        low_out, high_out = self._range(lambda: (self._score_out(b) for b in buckets))

        def adaptive(bucket: Bucket) -> tuple[Tensor, Tensor]:
            z_in = (bucket.of(score_in) - low_in) / (high_in - low_in)
            z_out = (self._score_out(bucket) - low_out) / (high_out - low_out)
            return adaptive_weights(z_in.nan_to_num(0.0), z_out.nan_to_num(0.0), self.fusion.temperature)

        return adaptive

    def _shares(self, score_in: Tensor) -> Callable[[Bucket], tuple[Tensor, Tensor]]:
        """One weight for all elements, or for each tensor: the inner fraction of the summed scores."""
        spans = self.flat.spans
        sums = torch.zeros(2, len(spans), device=self.flat.device)
        place = {name: i for i, name in enumerate(spans)}
        for bucket in self.flat.buckets:
            out = self._score_out(bucket)
            for name in bucket.names:
                start, stop = spans[name]
                sums[0, place[name]] = score_in[start:stop].sum()
                sums[1, place[name]] = out[start - bucket.start : stop - bucket.start].sum()
        if self.add_up is not None:
            sums = self.add_up(sums)
        if self.fusion.scope == "global":
            sums = sums.sum(1, keepdim=True).expand_as(sums)
        # If nothing was measured on either side, both count equally.
        shares = torch.where(sums.sum(0) > 0, sums[0] / sums.sum(0), 0.5)

        def given(bucket: Bucket) -> tuple[Tensor, Tensor]:
            w_in = torch.cat([shares[place[n]].expand(spans[n][1] - spans[n][0]) for n in bucket.names])
            return w_in, 1 - w_in

        return given

    def _range(self, parts: Callable[[], object]) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of all parts; over processes with the exact selection."""
        if self.add_up is None:
            ends = [torch.aminmax(p) for p in parts() if p.numel()]  # pyrefly: ignore
            return torch.stack([e.min for e in ends]).min(), torch.stack([e.max for e in ends]).max()
        ends = [kth_smallest(parts, k, self.add_up) for k in (0, self.total - 1)]  # pyrefly: ignore
        return ends[0].to(self.flat.device), ends[1].to(self.flat.device)
