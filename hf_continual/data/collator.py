"""Replay rows into a micro-batch that is already collated, with a map of where each token comes from.

Why not in the sampler or the dataset: only where a whole accumulation window is at hand can the
number of loss tokens still be counted over task and replay together, and only there does the draw
not depend on sampling, workers, streaming, packing and prefetching.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_continual.data.flat_rows import UNMASKED
from hf_continual.data.replay import Pair

ORIGIN = "replay_origin"  # key of the origin maps in a merged batch
TASK_TOKENS = "task_tokens"  # key of the host-side token count in a task batch
ROW = "task_row"  # column that holds a row's place among the task's rows

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class CountTokens:
    """A collator that also reports, as a plain integer, how many tokens the batch holds.

    Counting afterwards would ask the accelerator for a number and stall it in every micro-batch.

    Args:
        collate: The collator that does the work.
    """

    collate: Callable[[Rows], dict[str, Any]]

    def __call__(self, rows: Rows) -> dict[str, Any]:
        """Collate, then count the batch's tokens: a collator may shorten rows, or tokenise them only now."""
        batch = {**self.collate(rows)}
        if (mask := _mask(batch)) is not None:
            count = int(mask.sum())
        elif all("input_ids" in row for row in rows):
            count = sum(len(row["input_ids"]) for row in rows)
        else:
            count = int(batch["input_ids"].numel())
        return {**batch, TASK_TOKENS: count}


@dataclass(frozen=True)
class NameRows:
    """A collator that also reports which row of the task each token comes from, and its place in that row.

    Args:
        collate: The collator that does the work.
    """

    collate: Callable[[Rows], dict[str, Any]]

    def __call__(self, rows: Rows) -> dict[str, Any]:
        """Collate; the maps ``source``, ``row`` and ``offset`` of shape (B, S) are under the key ``replay_origin``."""
        plain = [{key: value for key, value in row.items() if key != ROW} for row in rows]
        batch = {**self.collate(plain)}
        flattened = batch["input_ids"].shape[0] == 1 and len(rows) > 1  # one row is one row either way
        named = [(-1, int(row[ROW]), tokens) for row, tokens in zip(rows, plain, strict=True)]
        origin = token_maps(batch, named, flattened, "the task's rows")
        return {**batch, ORIGIN: {**origin, "named": [(row, len(tokens["input_ids"])) for _, row, tokens in named]}}


@dataclass(frozen=True)
class PairRows:
    """A collator that puts next to each of the task's rows those that methods pair with it; a packed row has several.

    Args:
        collate: The collator that does the work.
        join: Puts the rows into the batch.
        pairs: ``(source, function)``, see `ReplayRows.pair`.
    """

    collate: Callable[[Rows], dict[str, Any]]
    join: ReplayCollator
    pairs: Sequence[tuple[int, Pair]]

    def __call__(self, rows: Rows) -> dict[str, Any]:
        """Collate; the paired rows belong to their source and are not among the counted tokens of the task."""
        batch = {**self.collate([{key: value for key, value in row.items() if key != UNMASKED} for row in rows])}
        count = batch.pop(TASK_TOKENS, None)
        made = [
            (k, int(row.get(ROW, -1)), pair(*document))
            for k, pair in self.pairs
            for row in rows
            for document in _documents(row)
        ]
        merged = self.join.merge(batch, [(k, place, row) for k, place, row in made if row is not None])
        return merged if count is None else {**merged, TASK_TOKENS: count}


def _documents(row: Mapping[str, Any]) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Tokens and labels of a row, or of each row that was packed into it; the labels before any were masked."""
    start, labels = 0, row.get(UNMASKED) or row["labels"]
    for length in row.get("seq_lengths") or [len(row["input_ids"])]:
        yield row["input_ids"][start : start + length], labels[start : start + length]
        start += length


def token_maps(
    batch: Mapping[str, Any], named: Sequence[tuple[int, int, Any]], flattened: bool, whose: str
) -> dict[str, Tensor]:
    """Map each token of a collated batch to the row it comes from.

    Args:
        batch: The collated rows.
        named: ``(source, index of the row in its source, row)`` of each row, in order.
        flattened: Whether the batch is one long row.
        whose: Name of the rows in messages.

    Returns:
        The maps ``source``, ``row`` and ``offset``, laid out like `input_ids`.

    Raises:
        ValueError: If the collator does not keep rows as they are.
    """
    lengths = torch.tensor([len(row["input_ids"]) for *_, row in named])
    per_token = {
        "source": torch.tensor([source for source, *_ in named]).repeat_interleave(lengths),
        "row": torch.tensor([index for _, index, _ in named]).repeat_interleave(lengths),
        "offset": torch.cat([torch.arange(int(n)) for n in lengths]),
    }
    ids = batch["input_ids"]
    mask = None if flattened else _mask(batch)
    if flattened:
        used = torch.arange(ids.shape[1])[None] < int(lengths.sum())
    elif mask is None:
        used = torch.arange(ids.shape[1])[None] < lengths[:, None]
    else:
        used = mask.bool()
    if used.shape != ids.shape or int(used.sum()) != int(lengths.sum()):
        raise ValueError(
            f"The data collator returned {int(used.sum())} tokens for {whose} that hold "
            f"{int(lengths.sum())}: it shortens or extends rows, so the origin of a token is unknown. "
            f"Truncate the rows before training, or use the default collator."
        )
    given = torch.tensor([token for *_, row in named for token in row["input_ids"]], dtype=ids.dtype)
    if not torch.equal(ids[used].cpu(), given):
        raise ValueError(
            f"The data collator returned different tokens than {whose} hold, or a different order, so the origin "
            f"of a token is unknown. Use a collator that keeps rows as they are, or the default collator."
        )
    maps = {}
    for key, values in per_token.items():
        maps[key] = torch.full_like(ids, -100 if key == "source" else -1)
        maps[key][used] = values.to(ids.dtype)
    return maps


def task_tokens(batch: dict[str, Any]) -> int:
    """Take the token count out of a batch; count the tensor if no `CountTokens` was used."""
    if (count := batch.pop(TASK_TOKENS, None)) is not None:
        return int(count)
    mask = _mask(batch)
    return int(batch["input_ids"].numel() if mask is None else mask.sum())


def _mask(batch: Mapping[str, Any]) -> Tensor | None:
    """The attention mask (B, S) of a batch, where it has one of that shape."""
    mask = batch.get("attention_mask")
    return mask if mask is not None and mask.shape == batch["input_ids"].shape else None


@dataclass
class ReplayCollator:
    """Merges drawn rows into task batches: padded batches grow by rows, flattened ones in length.

    Args:
        collate: The task's own collator; replay rows go through the same code.
        flattened: Whether batches are one long row without padding (packing "bfd", padding-free).
        pad_token_id: Fills `input_ids` when rows of different widths are merged.
    """

    collate: Callable[[Rows], dict[str, Any]]
    flattened: bool
    pad_token_id: int
    fill: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.fill = {"input_ids": self.pad_token_id, "labels": -100}

    def merge(self, batch: dict[str, Any], drawn: Sequence[tuple[int, int, Mapping[str, Any]]]) -> dict:
        """Add drawn rows to one collated batch.

        Args:
            batch: Collated task rows, on any device; its ``task_tokens`` key must be taken out.
            drawn: ``(source, index of the row in its source, tokenised row)`` of each row to add.

        Returns:
            A batch for one forward pass, with the maps ``source``, ``row`` and ``offset`` of shape
            (B, S) under the key ``replay_origin``. Task tokens have source -1, padding -100.

        Raises:
            ValueError: If the collator yields something that cannot be merged.
        """
        device = batch["input_ids"].device
        batch = {**batch}
        origin = batch.pop(ORIGIN, None)
        if origin is None:
            origin = {"source": _task_source(batch)}
            origin["row"] = origin["offset"] = torch.full_like(origin["source"], -1)
        if not drawn:
            return {**batch, ORIGIN: origin}
        rows = [{"input_ids": list(r["input_ids"]), "labels": list(r["labels"])} for *_, r in drawn]
        added = self.collate(rows)
        added_origin = token_maps(added, drawn, self.flattened, "the replay rows")
        if missing := batch.keys() ^ added.keys():
            raise ValueError(
                f"The task's batches and the replay rows collate to different keys: "
                f"{', '.join(sorted(missing))} are on one side only, so they cannot share a forward "
                f"pass. Give both the same columns, or tokenise the replay rows to input_ids and labels."
            )
        added = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in added.items()}
        added_origin = {k: v.to(device, non_blocking=True) for k, v in added_origin.items()}
        join = self._append if self.flattened else self._stack
        merged = join(batch, added)
        fills = {"source": -100, "row": -1, "offset": -1}
        axis = 1 if self.flattened else 0
        merged[ORIGIN] = {
            **{k: _cat(origin[k], added_origin[k], fills[k], axis) for k in fills},
            "named": origin.get("named", ()),
            "drawn": [*origin.get("drawn", ()), *((k, index, len(row["input_ids"])) for k, index, row in drawn)],
        }
        return merged

    def _stack(self, batch: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
        for key, value in batch.items():
            if not torch.is_tensor(value) or value.dim() < 2:
                raise ValueError(
                    f"The batch key {key!r} ({type(value).__name__}) is not a tensor of rows, so replay "
                    f"rows cannot be stacked below it. Use a collator that returns tensors of shape (B, S)."
                )
        return {k: _cat(batch[k], added[k], self.fill.get(k, 0), axis=0) for k in batch}

    def _append(self, batch: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
        """Lengthen a flattened batch; document boundaries and indices continue after the task's."""
        tokens = batch["input_ids"].shape[1]
        merged: dict[str, Any] = {}
        for key, value in batch.items():
            more = added[key]
            if value is None:
                merged[key] = None
            elif key.startswith("cu_seq_lens"):
                merged[key] = torch.cat([value, more[1:] + tokens])
            elif key.startswith("max_length"):
                merged[key] = max(value, more)
            elif key == "seq_idx":
                merged[key] = torch.cat([value, more + value[:, -1:] + 1 - more[:, :1]], dim=1)
            else:
                merged[key] = torch.cat([value, more], dim=1)
        return merged


def _task_source(batch: Mapping[str, Any]) -> Tensor:
    ids = batch["input_ids"]
    if (mask := _mask(batch)) is not None:
        return torch.where(mask.bool(), -1, -100).to(ids.dtype)
    return torch.full_like(ids, -1)


def _cat(first: Tensor, second: Tensor, fill: int, axis: int) -> Tensor:
    """Concatenate; along rows both are widened to the same length on the right first."""
    if axis == 0:
        width = max(first.shape[1], second.shape[1])
        first, second = (pad(t, (0, width - t.shape[1]), value=fill) for t in (first, second))
    return torch.cat([first, second], dim=axis)
