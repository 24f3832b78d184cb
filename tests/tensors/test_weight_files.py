"""The files with a model's weights: those from_pretrained loads, and never a file outside the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_continual.atomic_files import read_object
from hf_continual.tensors.weight_files import INDEX, WEIGHTS, is_file_name, unused_index, weight_files, weight_map


def index(folder: Path, weight_map: object) -> Path:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / INDEX


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors", "/x.safetensors", "a/../x.safetensors", "sub/x.safetensors", "./x.safetensors", "..",
        "..\\x.safetensors", "C:\\x.safetensors", "C:x.safetensors", "\\\\host\\share\\x.safetensors", "", ".", "x.bin",
        "x.safetensors\0", "x\n.safetensors", "file:///x.safetensors", "~/x.safetensors", None, 7, ["x.safetensors"],
    ],
)  # fmt: skip
def test_a_name_that_is_more_than_a_files_name_is_refused(tmp_path, name):
    assert not is_file_name(name)
    file = index(tmp_path, {"good": "model-00001-of-00002.safetensors", "bad.weight": name})
    with pytest.raises(ValueError, match=r"index\.json says that 'bad\.weight' is in .*never a path elsewhere"):
        weight_files(tmp_path)
    assert is_file_name("model-00001-of-00002.safetensors") and weight_files(file.parent.parent)[0].name == WEIGHTS


def test_the_single_file_goes_before_an_index(tmp_path):
    index(tmp_path, {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"})
    assert [p.name for p in weight_files(tmp_path)] == ["model-2.safetensors", "model-1.safetensors"]
    assert unused_index(tmp_path) is None
    (tmp_path / WEIGHTS).touch()
    assert weight_files(tmp_path) == [tmp_path / WEIGHTS] and unused_index(tmp_path) == tmp_path / INDEX


@pytest.mark.parametrize("found", [None, [], {}, "model.safetensors"])
def test_an_index_without_a_map(tmp_path, found):
    with pytest.raises(ValueError, match=r"index\.json has no weight_map"):
        weight_map(index(tmp_path, found))


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "is not JSON"),
        (b'{"a": ', "is not JSON"),
        (b"[1]", "holds a JSON list where an object is expected"),
        (b"\xff\xfe{}", r"is not UTF-8 text \(byte 0\)"),
        (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
    ],
)
def test_a_foreign_file_is_named_when_it_cannot_be_read(tmp_path, data, said):
    file = tmp_path / "theirs.json"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"theirs\.json .*{said}|theirs\.json {said}"):
        read_object(file)
