"""Merging rows into collated batches, with TRL's own collator in all its layouts."""

from __future__ import annotations

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_continual.data.collator import ORIGIN, CountTokens, NameRows, PairRows, ReplayCollator, task_tokens

TASK = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
LONG = {"input_ids": [11, 12, 13, 14, 15], "labels": [-100, 12, 13, 14, 15]}
SHORT = {"input_ids": [21, 22], "labels": [21, 22]}


def collator(**kwargs):
    return DataCollatorForLanguageModeling(pad_token_id=0, **kwargs)


def test_padded_batches_grow_by_rows_and_equal_collating_together():
    collate = collator()
    merged = ReplayCollator(collate, False, 0).merge(collate(TASK), [(0, 3, LONG), (1, 9, SHORT)])
    origin = merged.pop(ORIGIN)
    together = collate([*TASK, LONG, SHORT])
    assert merged.keys() == together.keys()
    for key, value in together.items():
        assert torch.equal(merged[key], value), key
    assert origin["source"].tolist() == [
        [-1, -1, -1, -100, -100],
        [-1, -100, -100, -100, -100],
        [0, 0, 0, 0, 0],
        [1, 1, -100, -100, -100],
    ]
    assert origin["row"][2:].tolist() == [[3] * 5, [9, 9, -1, -1, -1]]
    assert origin["offset"][2:].tolist() == [[0, 1, 2, 3, 4], [0, 1, -1, -1, -1]]


def test_replay_rows_may_be_shorter_than_the_tasks():
    collate = collator()
    merged = ReplayCollator(collate, False, 0).merge(collate([LONG]), [(0, 0, SHORT)])
    assert merged["input_ids"].tolist() == [[11, 12, 13, 14, 15], [21, 22, 0, 0, 0]]
    assert merged["labels"][1].tolist() == [21, 22, -100, -100, -100]
    assert merged["attention_mask"][1].tolist() == [1, 1, 0, 0, 0]


def test_flattened_batches_grow_in_length_and_documents_stay_apart():
    collate = collator(padding_free=True)
    merged = ReplayCollator(collate, True, 0).merge(collate(TASK), [(0, 3, LONG), (0, 4, SHORT)])
    origin = merged.pop(ORIGIN)
    together = collate([*TASK, LONG, SHORT])
    for key, value in together.items():
        same = torch.equal(merged[key], value) if torch.is_tensor(value) else merged[key] == value
        assert same, key
    assert origin["source"].tolist() == [[-1] * 4 + [0] * 7]
    assert origin["row"].tolist() == [[-1] * 4 + [3] * 5 + [4] * 2]
    assert origin["offset"].tolist() == [[-1] * 4 + [0, 1, 2, 3, 4, 0, 1]]


def test_packed_rows_keep_their_documents():
    collate = collator(padding_free=True)
    packed = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "seq_lengths": [3, 1]}]
    merged = ReplayCollator(collate, True, 0).merge(collate(packed), [(0, 0, SHORT)])
    assert merged["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert merged["cu_seq_lens_q"].tolist() == [0, 3, 4, 6]
    assert merged["seq_idx"].tolist() == [[0, 0, 0, 1, 2, 2]]
    assert merged["labels"].tolist() == [[-100, 6, 7, -100, -100, 22]]


@pytest.mark.parametrize("flattened", [False, True])
def test_widths_stay_multiples(flattened):
    collate = collator(padding_free=flattened, pad_to_multiple_of=8)
    merged = ReplayCollator(collate, flattened, 0).merge(collate(TASK), [(0, 0, LONG)])
    assert merged["input_ids"].shape[1] % 8 == 0
    assert merged[ORIGIN]["source"].shape == merged["input_ids"].shape
    assert int((merged[ORIGIN]["source"] == 0).sum()) == 5


@pytest.mark.parametrize("flattened", [False, True])
def test_without_drawn_rows_the_batch_is_the_tasks(flattened):
    collate = collator(padding_free=flattened)
    batch = collate(TASK)
    merged = ReplayCollator(collate, flattened, 0).merge(batch, [])
    origin = merged.pop(ORIGIN)
    assert merged == batch
    assert int((origin["source"] == -1).sum()) == 4


def test_tokens_are_counted_on_the_host():
    batch = CountTokens(collator())(TASK)
    assert task_tokens(batch) == 4
    assert "task_tokens" not in batch
    assert task_tokens(batch) == 4  # counted from the mask now
    assert task_tokens(collator(padding_free=True)(TASK)) == 4


def test_collators_that_change_rows_are_refused():
    def shortening(rows):
        return collator()([{k: v[:1] for k, v in row.items()} for row in rows])

    with pytest.raises(ValueError, match="returned 1 tokens for the replay rows that hold 5"):
        ReplayCollator(shortening, False, 0).merge(collator()(TASK), [(0, 0, LONG)])


def test_different_keys_are_named():
    batch = {**collator()(TASK), "pixel_values": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match="pixel_values"):
        ReplayCollator(collator(), False, 0).merge(batch, [(0, 0, LONG)])


def test_what_cannot_be_stacked_is_named():
    def collate(rows):
        return {**collator()(rows), "names": ["x"] * len(rows)}

    with pytest.raises(ValueError, match="'names'"):
        ReplayCollator(collate, False, 0).merge(collate(TASK), [(0, 0, LONG)])


def twice(tokens, labels):
    """A row beside another: its tokens again with one in front; none beside a single token."""
    return {"input_ids": [99, *tokens], "labels": [-100, *tokens]} if len(tokens) > 1 else None


@pytest.mark.parametrize("flattened", [False, True])
def test_rows_are_paired_within_their_batch(flattened):
    collate = collator(padding_free=flattened)
    batch = PairRows(CountTokens(NameRows(collate)), ReplayCollator(collate, flattened, 0), [(2, twice)])(
        [{**row, "task_row": place} for row, place in zip(TASK, (7, 8), strict=True)]
    )
    origin = batch[ORIGIN]
    assert task_tokens(batch) == 4  # of the task
    assert origin["drawn"] == [(2, 7, 4)]  # beside row 7
    paired = origin["source"] == 2
    assert batch["input_ids"][paired].tolist() == [99, 5, 6, 7]
    assert origin["offset"][paired].tolist() == [0, 1, 2, 3] and set(origin["row"][paired].tolist()) == {7}
    merged = ReplayCollator(collate, flattened, 0).merge(batch, [(0, 3, LONG)])
    assert merged[ORIGIN]["drawn"] == [(2, 7, 4), (0, 3, 5)]


def test_each_row_of_a_pack_has_its_pair():
    collate = collator(padding_free=True)
    packed = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "seq_lengths": [2, 2]}]
    batch = PairRows(collate, ReplayCollator(collate, True, 0), [(0, twice)])(packed)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 99, 5, 6, 99, 7, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 0, 1, 2, 0, 1, 2]]
    assert batch[ORIGIN]["drawn"] == [(0, -1, 3), (0, -1, 3)]
