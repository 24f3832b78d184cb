"""Rows from memory, files, folders; and the sentences when there are none."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, DatasetDict

from hf_continual.data.rows import load_rows, row_lengths

ROWS = [{"text": "a b"}, {"text": "c"}]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv", "txt"])
def test_files(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    data = Dataset.from_list(ROWS)
    if suffix == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
    elif suffix == "json":
        path.write_text(json.dumps(ROWS))
    elif suffix == "parquet":
        data.to_parquet(path)
    elif suffix == "csv":
        data.to_csv(path)
    else:
        path.write_text("a b\nc\n")
    assert load_rows(str(path))["text"][:] == ["a b", "c"]
    assert len(load_rows(path)) == 2


def test_memory_and_saved_folders(tmp_path):
    data = Dataset.from_list(ROWS)
    assert load_rows(data) is data
    assert load_rows(ROWS)["text"][:] == ["a b", "c"]
    data.save_to_disk(tmp_path / "one")
    DatasetDict(train=data).save_to_disk(tmp_path / "several")
    assert len(load_rows(str(tmp_path / "one"))) == len(load_rows(str(tmp_path / "several"))) == 2
    with pytest.raises(ValueError, match="splits train and none called 'test'"):
        load_rows(str(tmp_path / "several"), split="test")


def test_sentences(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'old\.jsonl' does not exist"):
        load_rows("old.jsonl")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_rows("./somewhere/rows")
    with pytest.raises(ValueError, match="0 rows"):
        load_rows(Dataset.from_dict({"text": []}))
    with pytest.raises(ValueError, match="0 rows"):
        load_rows([])
    with pytest.raises(TypeError, match="streaming dataset has no length"):
        load_rows(Dataset.from_list(ROWS).to_iterable_dataset())
    with pytest.raises(TypeError, match="must be dictionaries"):
        load_rows(["a", "b"])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="0 rows"):
        load_rows(tmp_path / "empty.jsonl")
    (tmp_path / "rows.xlsx").write_text("x")
    with pytest.raises(ValueError, match=r"'\.xlsx' cannot be read"):
        load_rows(tmp_path / "rows.xlsx")


def test_lengths_follow_shuffles_and_selections():
    data = Dataset.from_dict({"input_ids": [[1] * n for n in (3, 0, 7, 2)]})
    assert row_lengths(data).tolist() == [3, 0, 7, 2]
    assert row_lengths(data.select([2, 0])).tolist() == [7, 3]
    shuffled = data.shuffle(seed=1)
    assert row_lengths(shuffled).tolist() == [len(ids) for ids in shuffled["input_ids"]]
