"""A merge as a file: with this library's keys, or mergekit's if both mean the same."""

from __future__ import annotations

import json

import pytest
import yaml
from typer.testing import CliRunner

from hf_continual import dare, merge_linear, slerp, task_arithmetic, ties
from hf_continual.cli import app
from hf_continual.merging.config_file import read_merge_file
from hf_continual.merging.errors import MergeError
from tests.merging.world import digest, family


def write(folder, data):
    file = folder / "merge.yaml"
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    return file


def run(*arguments):
    return CliRunner().invoke(app, ["merge", *map(str, arguments), "--quiet"])


def test_own_keys(tmp_path):
    base, a, b = map(str, family(tmp_path))
    data = {
        "method": "ties",
        "models": [a, b],
        "base": base,
        "out": str(tmp_path / "out"),
        "density": 0.3,
        "dtype": "bfloat16",
    }
    file = write(tmp_path, data)
    done = run("--config", file)
    assert done.exit_code == 0, (done.output, done.exception)
    ties([a, b], tmp_path / "same", base=base, density=0.3, dtype="bfloat16")
    assert digest(tmp_path / "out") == digest(tmp_path / "same")
    over = run("--config", file, "--out", tmp_path / "other", "--density", "0.5", "--dtype", "float32")
    assert over.exit_code == 0, (over.output, over.exception)
    report = json.loads((tmp_path / "other" / "merge_report.json").read_text())
    assert report["options"]["density"] == 0.5 and report["output_options"]["dtype"] == "F32"


def test_mergekits_keys(tmp_path):
    base, a, b = map(str, family(tmp_path))
    two = lambda **each: [{"model": m, "parameters": {k: v[i] for k, v in each.items()}} for i, m in enumerate((a, b))]  # noqa: E731
    files = {
        "linear": {"merge_method": "linear", "models": two(weight=[0.7, 0.3]), "dtype": "float32"},
        "task": {"merge_method": "task_arithmetic", "base_model": base, "models": two(weight=[0.5, -0.2]), "parameters": {"lambda": 0.5}},
        "ties": {
            "merge_method": "ties", "base_model": base, "models": [{"model": base}, *two(weight=[1.0, 1.0], density=[0.4, 0.4])],
            "parameters": {"normalize": True},
        },
        "dare": {"merge_method": "dare_linear", "base_model": base, "models": two(weight=[0.5, 0.5]), "parameters": {"density": 0.2}},
        "slerp": {"merge_method": "slerp", "base_model": a, "models": [{"model": a}, {"model": b}], "parameters": {"t": 0.25}},
    }  # fmt: skip
    for name, data in files.items():
        done = run("--config", write(tmp_path, data), "--out", tmp_path / name)
        assert done.exit_code == 0, (name, done.output, done.exception)
    merge_linear([a, b], tmp_path / "1", weights=[0.7, 0.3], dtype="float32")
    task_arithmetic([a, b], tmp_path / "2", base=base, scale=[0.25, -0.1])
    ties([a, b], tmp_path / "3", base=base, density=0.4)
    dare([a, b], tmp_path / "4", base=base, density=0.2, scale=0.5)
    slerp(a, b, tmp_path / "5", t=0.25)
    for i, name in enumerate(files, start=1):
        assert digest(tmp_path / name) == digest(tmp_path / str(i)), name


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([1], "holds list, expected a mapping"),
        ({"models": ["a"]}, "the key 'method' is missing"),
        ({"method": "ties", "models": "a"}, "models='a': give a list"),
        (
            {"merge_method": "della", "models": []},
            "merge_method='della' is not a method that mergekit and this library share",
        ),
        ({"merge_method": "linear", "slices": [1]}, "`slices` builds a model from the layers"),
        ({"merge_method": "linear", "modells": []}, "unknown key 'modells'. Did you mean 'models'"),
        ({"merge_method": "linear", "models": ["a"]}, "needs the key 'model'"),
        ({"merge_method": "linear", "tokenizer_source": "union", "models": []}, "tokenizer_source='union'"),
        (
            {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": [0, 1]}}]},
            r"weight=\[0, 1\] of a: only one number for all tensors",
        ),
        (
            {
                "merge_method": "ties",
                "models": [{"model": m, "parameters": {"weight": w}} for m, w in (("a", 1), ("b", 2))],
            },
            r"the weights of ties are \[1.0, 2.0\]",
        ),
        (
            {"merge_method": "dare_ties", "models": [{"model": "a"}]},
            "without normalize=true adds up the changes that agree",
        ),
        (
            {
                "merge_method": "ties",
                "models": [{"model": m, "parameters": {"density": d}} for m, d in (("a", 0.1), ("b", 0.2))],
            },
            r"density differs between the models \(\[0.1, 0.2\]\)",
        ),
        (
            {"merge_method": "linear", "models": [{"model": "a", "parameters": {"filter": 1}}]},
            "filter=1 of linear has no counterpart",
        ),
        (
            {"merge_method": "dare_linear", "models": [], "parameters": {"rescale": False}},
            "rescale=false of dare_linear",
        ),
    ],
)
def test_what_cannot_be_read_as_it_is_meant(tmp_path, data, said):
    with pytest.raises(MergeError, match=said):
        read_merge_file(write(tmp_path, data))


def test_of_the_command(tmp_path):
    _, a, b = map(str, family(tmp_path))
    file = write(tmp_path, {"method": "linear", "models": [a, b]})
    for arguments, said in (
        (("--config", file), "names no output folder"),
        (("linear", a, "--config", file, "--out", "x"), "names the method and the models"),
        (("--config", tmp_path / "nothing.yaml", "--out", "x"), "does not exist"),
        (("linear",), "needs METHOD, MODELS and --out"),
        (("linear", a, b, "--out", "x", "--set", "weights"), "write NAME=VALUE"),
    ):
        done = run(*arguments)
        assert done.exit_code != 0 and said in str(done.exception), (arguments, done.output, done.exception)
    (tmp_path / "merge.yaml").write_text("a: [")
    with pytest.raises(MergeError, match="cannot be read as YAML"):
        read_merge_file(tmp_path / "merge.yaml")
