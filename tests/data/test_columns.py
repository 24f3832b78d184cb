"""Columns mapped, labels named, prompts shortened; benchmarks as entries of a plan."""

from __future__ import annotations

import json

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_continual.data.benchmarks import (
    BENCHMARKS,
    HUB,
    LONG_ORDERS,
    STANDARD_ORDERS,
    TRACE,
    hub,
    long_sequence,
    published,
    standard,
    trace,
)
from hf_continual.data.biography import biography_rows, people
from hf_continual.data.columns import check_columns, cut_prompts, map_columns, take, without_options
from tests import toy

NEWS = Dataset.from_list([{"title": "A", "body": "x", "label": 1}, {"title": "B", "body": "y", "label": 0}])


def test_columns_are_mapped():
    assert map_columns(NEWS, {"prompt": "title", "completion": "body"}).to_list()[0] == {
        "prompt": "A",
        "completion": "x",
    }
    made = map_columns(NEWS, {"prompt": "{title}: {body}\nTopic:", "completion": " {label}"}, ["World", "Sports"])
    assert made.to_list() == [
        {"prompt": "A: x\nTopic:", "completion": " Sports"},
        {"prompt": "B: y\nTopic:", "completion": " World"},
    ]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    classes = Dataset.from_list([{"text": "t", "label": 1}], features=features)
    assert map_columns(classes, {"prompt": "text", "completion": " {label}"})[0]["completion"] == " yes"
    with pytest.raises(
        ValueError, match=r"made from the column 'titel', which the rows do not have. Did you mean 'title'\?"
    ):
        map_columns(NEWS, {"prompt": "titel"})
    with pytest.raises(ValueError, match="column 'label' holds the class 1, and labels names 1 classes"):
        map_columns(NEWS, {"completion": "{label}"}, ["World"])
    with pytest.raises(
        ValueError, match=r"scoring needs the column 'prompts'.* Is it 'prompt'\? Then write columns: {prompts: prompt}"
    ):
        check_columns(toy.rows("prompt_completion"), ["prompts"], "scoring")


def test_a_part_of_the_rows():
    rows = toy.rows(number=20)
    assert take(rows, 5, 1)["text"][:] == take(rows, 5, 1)["text"][:] != take(rows, 5, 2)["text"][:]
    assert take(rows, None) is rows and take(rows, 30) is rows and len(set(take(rows, 19)["text"])) > 10


def test_options_are_dropped_and_prompts_cut():
    prompt = "What is the topic? Choose one from the option. Option: a b, c & d.\nTitle: w1 w2 w3 w4 w5 w6.\nAnswer:"
    rows = Dataset.from_list([{"prompt": prompt, "completion": " a b"}])
    short = without_options(rows)
    assert short[0] == {"completion": " a b", "prompt": "What is the topic?\nTitle: w1 w2 w3 w4 w5 w6.\nAnswer:"}
    with pytest.raises(ValueError, match="no prompt has a sentence that lists options"):
        without_options(short)
    words = Dataset.from_list(
        [{"prompt": "w1 w2 w3 w4 w5\nw9", "completion": "w1"}, {"prompt": "w1\nw9", "completion": "w1"}]
    )
    cut = cut_prompts(words, 4, toy.tokenizer())
    assert cut["prompt"][:] == ["w1 w2 w3\nw9", "w1\nw9"]
    with pytest.raises(ValueError, match="max_prompt_tokens=0 is less than the last line"):
        cut_prompts(words, 0, toy.tokenizer())


def test_standard_and_long_sequences():
    assert STANDARD_ORDERS[1] == ("dbpedia", "amazon", "yahoo", "agnews")
    assert all(len(order) == 15 and set(order) == set(HUB) for order in LONG_ORDERS.values())
    assert [t["name"] for t in standard(3)] == ["yahoo", "amazon", "agnews", "dbpedia"]
    assert [t["name"] for t in long_sequence(2)][:3] == ["multirc", "boolqa", "wic"]
    for task in HUB:
        entry = hub(task)
        assert entry["train"].count("/") == 1 and entry["columns"]["prompt"].endswith(":") and len(entry["labels"]) >= 2
        row = dict.fromkeys(["text", "title", "content", "sentence", "label", "topic"], "x")
        assert entry["columns"]["completion"].strip(" {}") in row
    with pytest.raises(ValueError, match="standard: order=4 is not one of the papers' orders 1, 2, 3"):
        standard(4)


def test_published_files_of_both_layouts(tmp_path, caplog):
    (tmp_path / "rte.train.jsonl").write_text("{}")
    (tmp_path / "rte.dev.jsonl").write_text("{}")
    entry = published("rte", str(tmp_path))
    assert entry == {"name": "rte", "train": str(tmp_path / "rte.train.jsonl"), "test": str(tmp_path / "rte.dev.jsonl")}
    assert "rte has no test rows" in caplog.text
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "cb.json").write_text(
            json.dumps([{"id": 1, "instruction": "i\n", "input": "x\nAnswer:", "output": "no"}])
        )
    nested = published("cb", str(tmp_path))
    rows = map_columns(Dataset.from_json(nested["train"]), nested["columns"])
    assert rows[0] == {"prompt": "i\nx\nAnswer:", "completion": " no"}
    with pytest.raises(
        FileNotFoundError, match="has no training rows of 'wic': looked for wic.train.jsonl and train/wic.json"
    ):
        published("wic", str(tmp_path))


def test_trace_folders(tmp_path):
    for name in ("FOMC", "C-STANCE", "mine"):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            (tmp_path / name / f"{split}.json").write_text(json.dumps([{"prompt": "p", "answer": "a"}]))
    entries = trace(str(tmp_path))
    assert [e["name"] for e in entries] == ["C-STANCE", "FOMC"] and entries[1]["sft"] == {
        "num_train_epochs": TRACE["FOMC"][1]
    }
    assert entries[0]["metric"]["generated"]["match"] == "lower_exact"
    assert [e["name"] for e in trace(str(tmp_path), ["mine"])] == ["mine"] and "metric" not in trace(
        str(tmp_path), ["mine"]
    )[0]
    (tmp_path / "FOMC" / "test.json").unlink()
    with pytest.raises(
        FileNotFoundError, match="FOMC/test.json does not exist; the folder .* contains C-STANCE, FOMC, mine"
    ):
        trace(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="contains no task"):
        BENCHMARKS["trace"](str(tmp_path / "mine"))


def test_people_of_one_seed_are_told_apart_by_skip():
    first, rest = biography_rows(3, seed=4), biography_rows(2, skip=3, seed=4)
    names = [p.name for p in people(5, 4)]
    assert len(first) == 18 and all(any(n in row["prompt"] for n in names[3:]) for row in rest)
    texts = biography_rows(2, "texts", versions=3, seed=4)
    assert len(texts) == 6 and texts.column_names == ["text", "name"]
    with pytest.raises(ValueError, match="kind='poems' must be 'texts' or 'questions'"):
        biography_rows(2, "poems")  # type: ignore[arg-type]
