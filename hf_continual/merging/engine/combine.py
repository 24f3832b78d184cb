"""Turn a rule on the values of all models into the chunk function of one output tensor.

A rule is pure: values of one range in, one per model, result out. An adapter's change is computed only for the rows
of the current chunk; no adapter is ever merged into a whole weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from hf_continual.merging.engine.average import Average
from hf_continual.merging.engine.chunks import CHUNK, Chunk, Part
from hf_continual.merging.engine.rules import Rule, row_of, weights_of
from hf_continual.merging.inputs.adapter import Factors
from hf_continual.merging.inputs.members import View
from hf_continual.merging.inputs.safetensors_file import Files, StoredTensor

DORA_ROWS = 262_144  # elements that are read at a time for the norms of DoRA


def combined(views: Sequence[View], dtype: str, rule: Rule) -> Part:
    """Combine one tensor of all models into one.

    Args:
        views: The tensor in each model, in the rule's order; all of one shape.
        dtype: The output's dtype.
        rule: The rule. It returns equal values unchanged, so equal models are copied.

    Returns:
        Sources and chunk function.
    """
    sources = tuple(dict.fromkeys(v.source for v in views))
    place = {source: i for i, source in enumerate(sources)}
    places = [place[v.source] for v in views]
    if not sources[0].is_float:
        return Part(sources)
    stored = all(v.is_stored for v in views)
    if stored and len(sources) == 1:
        return Part(sources, None if sources[0].dtype == dtype else _first)
    row = row_of(rule, sources[0].shape)
    if stored and len(sources) == len(views):
        return Part(sources, lambda chunk: rule(chunk.values, chunk), row=row)
    also, scratch = _beside(views)
    plain = all(v.added is None and (v.factors is None or v.factors.magnitude is None) for v in views)
    if (weights := weights_of(rule)) is not None and plain:
        products = _AverageOfProducts(weights, places, [v.factors for v in views])
        return Part(sources, products, scratch, also)
    return Part(sources, _Materialised(rule, places, views), scratch + len(views) * CHUNK * 4, also, row)


def _beside(views: Sequence[View]) -> tuple[tuple[StoredTensor, ...], int]:
    """Stored tensors that the adapters add to a tensor, and the bytes that they take while its chunks are processed."""
    also: list[StoredTensor] = []
    kept = rows = 0
    for view in views:
        if view.factors is not None:
            parts = (view.factors.a, view.factors.b)
            # as stored, scaled, and one more copy while loading
            kept += sum(t.numel for t in parts) * 4 * 2
            columns = view.source.shape[-1] if view.source.shape else 1
            rows = max(rows, sum(t.numel for t in parts) * 4 + (CHUNK + 2 * columns) * 4 * 2)
            also += parts
            if view.factors.magnitude is not None:
                # the norms are made in float64, a range of rows at a time
                rows = max(rows, sum(t.numel for t in parts) * 8 * 3 + DORA_ROWS * 8 * 6) + CHUNK * 8 * 2
                also.append(view.factors.magnitude)
        if view.added is not None:
            also.append(view.added[0])
    return tuple(also), kept + rows


def _first(chunk: Chunk) -> Tensor:
    return chunk.values[0]


class _Loaded:
    """Holds the factors of one tensor while its chunks are processed."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def delta(self, key: int, factors: Factors, chunk: Chunk, scale: float = 1.0) -> Tensor:
        """The adapter's product in the range of a chunk, flat."""
        dtype = chunk.values[0].dtype
        if key not in self._held:
            left, right = factors.load(dtype)
            self._held[key] = (left * scale, right)
        left, right = self._held[key]
        columns = right.shape[1]
        first, last = chunk.start // columns, -(-chunk.stop // columns)
        rows = torch.mm(left[first:last], right).flatten()
        return rows[chunk.start - first * columns : chunk.stop - first * columns]

    def passed(self, chunk: Chunk) -> None:
        """Free the factors after the last chunk."""
        if chunk.stop == prod(chunk.shape):
            self._held.clear()


class _AverageOfProducts(_Loaded):
    """The weighted average where several models share stored weights: these are read once, and each product is added with its weight."""

    def __init__(self, weights: Sequence[float], places: Sequence[int], factors: Sequence[Factors | None]) -> None:
        super().__init__()
        shares = [0.0] * (max(places) + 1)
        for place, weight in zip(places, weights, strict=True):
            shares[place] += weight
        self._average = Average(tuple(shares))
        self._products = [(i, f, w) for i, (f, w) in enumerate(zip(factors, weights, strict=True)) if f is not None]

    def __call__(self, chunk: Chunk) -> Tensor:
        result = self._average(chunk.values)
        for i, factors, weight in self._products:
            result.add_(self.delta(i, factors, chunk, weight))
        self.passed(chunk)
        return result


class _Materialised(_Loaded):
    """Any rule: the range of each model is formed, then the rule sees them all."""

    def __init__(self, rule: Rule, places: Sequence[int], views: Sequence[View]) -> None:
        super().__init__()
        self._rule, self._places, self._views = rule, places, views
        self._norms: dict[int, Tensor] = {}

    def __call__(self, chunk: Chunk) -> Tensor:
        values = []
        for i, (place, view) in enumerate(zip(self._places, self._views, strict=True)):
            value = chunk.values[place].clone()
            if view.factors is not None:
                value.add_(self.delta(i, view.factors, chunk))
                if view.factors.magnitude is not None:
                    value.mul_(self._dora(i, view.source, view.factors, chunk))
            if view.added is not None:
                vector, scale = view.added
                with Files() as files:
                    value.add_(files.load(vector).to(value.dtype)[chunk.start : chunk.stop], alpha=scale)
            values.append(value)
        self.passed(chunk)
        return self._rule(values, chunk)

    def _dora(self, key: int, source: StoredTensor, factors: Factors, chunk: Chunk) -> Tensor:
        """DoRA's factor of each element of a chunk: magnitude / norm of the output's adapted weights."""
        if key not in self._norms:
            self._norms[key] = dora_factors(source, factors)
        columns = chunk.shape[1]
        place = torch.arange(chunk.start, chunk.stop)
        found = self._norms[key][place % columns if factors.transposed else place // columns].to(chunk.values[0].dtype)
        if chunk.stop == prod(chunk.shape):
            del self._norms[key]
        return found


def dora_factors(source: StoredTensor, factors: Factors) -> Tensor:
    """DoRA's magnitude over the norm of each output's weights, W0 + s B A, in a pass over the stored weight.

    Args:
        source: The base's weight.
        factors: The adapter's product and magnitudes.

    Returns:
        One factor per output, float64.
    """
    assert factors.magnitude is not None
    rows, columns = source.shape
    left, right = factors.load(torch.float64)
    squares = torch.zeros(columns if factors.transposed else rows, dtype=torch.float64)
    step = max(1, DORA_ROWS // columns)
    with Files() as files:
        magnitude = files.load(factors.magnitude).flatten().double()
        for first in range(0, rows, step):
            last = min(first + step, rows)
            weight = files.load(source.rows(first, last)).double().add_(left[first:last] @ right)
            if factors.transposed:
                squares += weight.square().sum(0)
            else:
                squares[first:last] = weight.square().sum(1)
    return magnitude / squares.sqrt_()
