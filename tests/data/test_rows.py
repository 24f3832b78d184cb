"""Rows from memory, files, folders; and the errors when there are none."""

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
    with pytest.raises(ValueError, match="has no rows"):
        load_rows(Dataset.from_dict({"text": []}))
    with pytest.raises(ValueError, match="has no rows"):
        load_rows([])
    with pytest.raises(TypeError, match="streaming dataset has no length"):
        load_rows(Dataset.from_list(ROWS).to_iterable_dataset())
    with pytest.raises(TypeError, match="must be dictionaries"):
        load_rows(["a", "b"])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no rows"):
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


BROKEN = {
    "half.jsonl": (b'{"prompt": "a", "completion": "b"}\n{"prompt": "c", "comp', "line 2: not valid JSON.*it contains"),
    "words.jsonl": (b"these are words\n", "line 1: not valid JSON.*'these are words'"),
    "array.jsonl": (b'{"text": "a"}\n\n["b"]\n', r'line 3: a row must be an object.*a list, \["b"\]'),
    "number.jsonl": (b"1\n2\n", "line 1: a row must be an object.*a number, 1"),
    "number.json": (b'[{"text": "a"}, 7]', "entry 2: a row must be an object.*a number, 7"),
    "twice.jsonl": (b'{"text": "a", "text": "b"}\n', "line 1.*the key 'text' is given twice"),
    "deep.jsonl": (b"[" * 200_000, "line 1: its JSON is nested too deeply"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2: the byte 0xe9 is not UTF-8"),
    "latin.csv": (b"text\na\n\xe9\n", "line 3: the byte 0xe9 is not UTF-8"),
    "latin.txt": (b"a\n\xe9\n", "line 2: the byte 0xe9 is not UTF-8"),
    "utf16.jsonl": ('{"text": "a"}\n'.encode("utf-16"), "line 1: the byte 0xff is not UTF-8"),
    "zero.jsonl": (b'{"text": "a"}\n{"text": "b\0"}\n', "line 2: a NUL byte"),
    "zero.csv": (b"text\na\0\n", "line 2: a NUL byte"),
    "long.csv": (b"prompt,completion\na,b\nc,d,e,f\n", "line 3: 4 fields, and line 1 names 2"),
    "short.csv": (b'prompt,completion\n"a\nb",c\nd\n', "line 4: 1 fields, and line 1 names 2"),
    "open.csv": (b'prompt,completion\na,"b\n', "line 2: not valid CSV"),
    "cut.parquet": (b"PAR1 and no more", "cannot be read as Parquet"),
    "mixed.jsonl": (b'{"completion": "a"}\n{"completion": 3}\n', "line 2: 'completion': it must be text.*a number, 3.*columns"),
    "nested.jsonl": (b'{"completion": "a"}\n{"completion": {"b": 1}}\n', "line 2: 'completion'.*an object"),
    "null.jsonl": (b'{"prompt": "a"}\n{"prompt": null}\n', "line 2: 'prompt'.*is null"),
    "missing.jsonl": (b'{"prompt": "a", "completion": "b"}\n{"prompt": "c"}\n', "line 2: 'completion'.*is null"),
    "two_kinds.jsonl": (
        b'{"prompt": "a"}\n{"prompt": [{"role": "user", "content": "b"}]}\n', "line 2: 'prompt' is a list.*not the same kind.*line 1",
    ),
    "half_chat.jsonl": (
        b'{"prompt": [{"role": "user", "content": "b"}], "completion": "c"}\n', "'prompt' is messages and 'completion' is text",
    ),
    "content.jsonl": (b'{"messages": [{"role": "user", "content": null}]}\n', "line 1: 'messages': the content of message 1"),
    "no_role.jsonl": (b'{"messages": [{"content": "a"}]}\n', "line 1: 'messages': message 1 has no role"),
    "no_chat.jsonl": (b'{"messages": []}\n', "line 1: 'messages': the list of messages is empty"),
    "all_empty.jsonl": (b'{"prompt": "a", "completion": ""}\n' * 3, "all 3 texts in the column 'completion' are empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_the_line_that_is_not_a_row_is_named(tmp_path, name):
    content, said = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){name}.*{said}"):
        load_rows(tmp_path / name)


def test_text_of_a_file_stays_what_it_is(tmp_path):
    (tmp_path / "rows.csv").write_text('prompt,completion,label\nNA,007,1\n"a, b",2024-05-01,2\nNone,1.50,3\n')
    rows = load_rows(tmp_path / "rows.csv")
    assert rows["prompt"][:] == ["NA", "a, b", "None"] and rows["completion"][:] == ["007", "2024-05-01", "1.50"]
    assert rows["label"][:] == [1, 2, 3]
    lines = [
        {"prompt": "a", "completion": "2024-05-01"},
        {"prompt": "b\u2028c", "completion": "2024-05-02", "more": [1]},
    ]
    (tmp_path / "rows.jsonl").write_text("\ufeff" + "\r\n".join(json.dumps(x, ensure_ascii=False) for x in lines))
    assert load_rows(tmp_path / "rows.jsonl").to_list() == [{**lines[0], "more": None}, lines[1]]


def test_columns_that_are_not_read_may_hold_anything(tmp_path):
    tools = [{"text": "a", "extra": 1}, {"text": "b", "extra": {"k": [None]}}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in tools))
    assert load_rows(tmp_path / "rows.jsonl")["extra"][:] == [1, {"k": [None]}]
    (tmp_path / "rows.jsonl").write_text('{"text": 1}\n{"text": null}\n')
    assert load_rows(tmp_path / "rows.jsonl", checked=())["text"][:] == [1, None]


def test_some_empty_texts_are_counted(tmp_path, caplog):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": ""}\n{"prompt": "b", "completion": "c"}\n')
    load_rows(tmp_path / "rows.jsonl")
    assert "rows.jsonl: 1 of 2 texts in the column 'completion' are empty" in caplog.text


def test_a_damaged_saved_dataset_is_named(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"x")
    with pytest.raises(ValueError, match="saved' cannot be read as a saved dataset"):
        load_rows(tmp_path / "saved")
