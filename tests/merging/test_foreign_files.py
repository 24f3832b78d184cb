"""Weight files written by others: read as transformers reads them, or refused by name; never read from elsewhere."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_continual import interpolate, kif_fuse, merge_linear, merge_with_recall, task_arithmetic, ties
from hf_continual.hub.contents import IncompleteFolder, collect
from hf_continual.merging.errors import MergeError
from tests.merging.world import build, family, save, tensors, tuned

INDEX = "model.safetensors.index.json"


def header_of(file):
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write(file, header, values):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + values)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A model, and one in two shards whose index says that a tensor is in a third model's file."""
    tmp = tmp_path_factory.mktemp("three")
    base, a, b = family(tmp, num_hidden_layers=1)
    save(AutoModelForCausalLM.from_pretrained(b), tmp / "sharded", max_shard_size="30KB")
    return tmp, base, a, b, tmp / "sharded"


@pytest.mark.parametrize("where", ["../m2/model.safetensors", "ABSOLUTE", "sub/model.safetensors"])
@pytest.mark.parametrize("rule", ["linear", "ties", "arithmetic", "interpolate", "recall", "kif"])
def test_no_merge_and_no_push_reads_outside_the_folder(three, tmp_path, where, rule):
    _, base, a, b, sharded = three
    here = tmp_path / "theirs"
    here.mkdir()
    for file in sharded.iterdir():
        (here / file.name).write_bytes(file.read_bytes())
    listed = json.loads((here / INDEX).read_text())
    last = sorted(listed["weight_map"])[-1]
    listed["weight_map"][last] = where if where != "ABSOLUTE" else str(b / "model.safetensors")
    (here / INDEX).write_text(json.dumps(listed))
    out, said = tmp_path / "out", rf"index\.json says that '{last}' is in .* never a path elsewhere"
    calls = {
        "linear": lambda: merge_linear([a, here], out),
        "ties": lambda: ties([a, here], out, base=base),
        "arithmetic": lambda: task_arithmetic([a], out, base=here),
        "interpolate": lambda: interpolate(base, here, out, alpha=0.5),
        "recall": lambda: merge_with_recall([a, here], out, weights={"default": [0.5, 0.5]}),
        "kif": lambda: kif_fuse(base, here, out, importance=b / "model.safetensors"),
    }
    with pytest.raises(MergeError, match=said):
        calls[rule]()
    with pytest.raises(IncompleteFolder, match=said):
        collect(here)
    assert not out.exists()


@pytest.mark.parametrize("newer", ["single", "shards"])
def test_of_a_single_file_and_an_index_the_one_that_transformers_loads_is_merged(tmp_path, newer):
    one, two = build(seed=1), build(seed=2)
    folder = save(two if newer == "shards" else one, tmp_path / "m", max_shard_size="40KB")
    shards = {p.name: p.read_bytes() for p in folder.glob("model-*")}
    (one if newer == "shards" else two).save_pretrained(tmp_path / "single")
    (folder / "model.safetensors").write_bytes((tmp_path / "single" / "model.safetensors").read_bytes())
    assert shards and (folder / INDEX).is_file()
    other = save(tuned(one, 5), tmp_path / "n")
    result = merge_linear([folder, other], tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    second = tensors(other)
    for name, found in tensors(tmp_path / "out").items():
        torch.testing.assert_close(found, (loaded[name] + second[name]) / 2)
    assert any("has both model.safetensors and model.safetensors.index.json" in n for n in result.report["notes"])
    with pytest.raises(
        IncompleteFolder, match=r"model\.safetensors and model\.safetensors\.index\.json.*Remove the old one"
    ):
        collect(folder)
    (folder / INDEX).unlink()  # the advice of both messages
    again = merge_linear([folder, other], tmp_path / "again")
    assert not any("index" in n for n in again.report["notes"])
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_a_tensor_that_only_the_index_has(three, tmp_path):
    _, _, a, _, sharded = three
    here = tmp_path / "theirs"
    here.mkdir()
    for file in sharded.iterdir():
        (here / file.name).write_bytes(file.read_bytes())
    listed = json.loads((here / INDEX).read_text())
    file = here / listed["weight_map"]["model.norm.weight"]
    kept = load_file(file)
    del kept["model.norm.weight"]
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(MergeError, match=rf"'model.norm.weight' is in {file.name}, but no file of the model holds it"):
        merge_linear([a, here], tmp_path / "out")
    other = next(p for p in here.glob("model-*") if p != file)
    save_file({**load_file(other), **kept}, other, {"format": "pt"})
    with pytest.raises(MergeError, match="in two files"):
        merge_linear([a, here], tmp_path / "out")


def test_a_tensor_that_the_index_forgot_is_loaded_and_merged(three, tmp_path):
    _, _, a, _, sharded = three
    here = tmp_path / "theirs"
    here.mkdir()
    for file in sharded.iterdir():
        (here / file.name).write_bytes(file.read_bytes())
    listed = json.loads((here / INDEX).read_text())
    del listed["weight_map"]["model.norm.weight"]
    (here / INDEX).write_text(json.dumps(listed))
    assert not AutoModelForCausalLM.from_pretrained(here, output_loading_info=True)[1]["missing_keys"]
    merge_linear([a, here], tmp_path / "out", weights=[0, 1])
    assert torch.equal(tensors(tmp_path / "out")["model.norm.weight"], tensors(sharded)["model.norm.weight"])


def shift(header, name, by):
    begin, end = header[name]["data_offsets"]
    header[name]["data_offsets"] = [begin + by, end + by]


DAMAGES = {
    "shared bytes": (lambda h: shift(h, "model.norm.weight", -4), "'.*' begins at byte .*: they share bytes"),
    "a hole": (lambda h: h.pop("model.embed_tokens.weight"), "the bytes between belong to no tensor"),
    "bytes after": (lambda h: h.pop(max((k for k in h if k[0] != "_"), key=lambda k: h[k]["data_offsets"])),
                     "the bytes after it belong to no tensor"),
    "beyond the end": (lambda h: shift(h, "model.norm.weight", 10**9), "'model.norm.weight'"),
    "negative": (lambda h: h["model.norm.weight"].update(data_offsets=[-4, 124]), "its header has .* for 'model.norm.weight'"),
    "other shape": (lambda h: h["model.norm.weight"].update(shape=[31]), "'model.norm.weight' should take 124 bytes"),
    "no shape": (lambda h: h["model.norm.weight"].pop("shape"), "its header has .* for 'model.norm.weight'"),
    "shape of text": (lambda h: h["model.norm.weight"].update(shape=["32"]), "its header has .* for 'model.norm.weight'"),
    "a number": (lambda h: h.update({"model.norm.weight": 7}), "its header has 7 for 'model.norm.weight'"),
    "huge shape": (lambda h: h["model.norm.weight"].update(shape=[2**62, 2**62]), "'model.norm.weight'"),
    "strange type": (lambda h: h["model.norm.weight"].update(dtype="F4"), "stores 'model.norm.weight' as F4"),
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_header_is_refused_with_file_and_tensor(three, tmp_path, how):
    _, _, a, b, _ = three
    here = save(AutoModelForCausalLM.from_pretrained(b), tmp_path / "theirs")
    header, values = header_of(here / "model.safetensors")
    change, said = DAMAGES[how]
    change(header)
    write(here / "model.safetensors", header, values)
    with pytest.raises(MergeError, match=rf"theirs/model\.safetensors .*{said}"):
        merge_linear([a, here], tmp_path / "out")
    with pytest.raises(IncompleteFolder, match=r"model\.safetensors .*is not a complete safetensors file"):
        collect(here)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, said",
    [
        (b"[1, 2]", "holds no tensors by name"),
        (b'{"a": ' + b"[" * 100_000, "cannot be read"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": 1}', "it lists 'a' twice"),
        (b'{"__metadata__": {"n": 1}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', "by safetensors"),
    ],
)
def test_a_header_that_is_something_else(three, tmp_path, text, said):
    _, _, a, b, _ = three
    here = save(AutoModelForCausalLM.from_pretrained(b), tmp_path / "theirs")
    write(here / "model.safetensors", text, b"\0" * 4)
    with pytest.raises(MergeError, match=rf"theirs/model\.safetensors .*{said}"):
        merge_linear([a, here], tmp_path / "out")


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b'{"a":' + b"[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_configuration_or_index_that_is_not_json(three, tmp_path, name, data):
    _, _, a, _, sharded = three
    here = tmp_path / "theirs"
    here.mkdir()
    for file in sharded.iterdir():
        (here / file.name).write_bytes(file.read_bytes())
    (here / name).write_bytes(data)
    with pytest.raises(MergeError, match=rf"theirs/{name} "):
        merge_linear([a, here], tmp_path / "out")
