"""Configurations that mean the same in two versions of transformers, and some that do not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_continual import merge_linear
from hf_continual.merging.errors import MergeError
from hf_continual.merging.inputs.architecture import understood
from tests.merging.world import build, cells, logits, save, tensors, tuned

DEFAULT = {"rope_type": "default", "rope_theta": 5000.0}
# Family, how it is built, and the values that transformers 4 writes instead of those of transformers 5 (None: the key is absent).
OLD_WORDS = {
    "theta": ("llama", {"rope_parameters": DEFAULT}, {"rope_theta": 5000.0, "rope_scaling": None}),
    "linear": (
        "llama tied",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}},
        {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 4}},
    ),
    "yarn": (
        "qwen",
        {
            "rope_parameters": {
                "rope_type": "yarn", "factor": 2.0, "rope_theta": 5000.0, "original_max_position_embeddings": 64,
            }
        },
        {"rope_theta": 5000, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "head_dim": 8},
    ),
    "window off": (
        "qwen",
        {"use_sliding_window": False},
        {"sliding_window": 32, "max_window_layers": 28, "layer_types": None, "rope_theta": 10000.0},
    ),
    "layer types": ("gemma", {}, {"rope_theta": 10000.0, "layer_types": None, "cache_implementation": "hybrid", "head_dim": 8}),
    "experts": ("mixtral", {}, {"rope_theta": 1e6, "head_dim": 8}),
}  # fmt: skip


def rewrite(folder, changes, drop=()):
    """Change a config.json; a key can be dropped."""
    file = folder / "config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if k not in drop}
    file.write_text(json.dumps({**config, **changes}))


def as_version_4(folder, changes):
    """The same model as written by transformers 4."""
    absent = [k for k, v in changes.items() if v is None and k != "rope_scaling"]
    given = {k: v for k, v in changes.items() if k not in absent}
    drop = ("rope_parameters", "dtype", "head_dim", *absent)
    rewrite(folder, {"torch_dtype": "float32", "transformers_version": "4.40.1", "pretraining_tp": 1, **given}, drop)


@pytest.mark.parametrize(("case", "old_first"), cells(OLD_WORDS, [True, False]))
def test_the_same_in_old_and_new_words(tmp_path, case, old_first):
    name, how, changes = OLD_WORDS[case]
    base = build(name, **how)
    a, b = save(base, tmp_path / "a"), save(tuned(base, 1), tmp_path / "b")
    old = a if old_first else b
    before = logits(AutoModelForCausalLM.from_pretrained(old))
    as_version_4(old, changes)
    assert torch.equal(before, logits(AutoModelForCausalLM.from_pretrained(old)))  # transformers reads both alike
    report = merge_linear([a, b], tmp_path / "out").report
    assert not [n for n in report["notes"] if "config." in n]
    one, two, out = tensors(a), tensors(b), tensors(tmp_path / "out")
    assert all(torch.allclose(out[k], (one[k] + two[k]) / 2, atol=1e-6) for k in out)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    "name, changes, drop, said",
    [
        ("llama", {"rope_theta": 5e5}, ["rope_parameters"], r"rope_parameters is .*10000.*base and .*500000.*other"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 8.0}}, ["rope_parameters"], "rope_parameters .*linear"),
        ("qwen", {"head_dim": 16}, [], "head_dim is 8 in base and 16 in other"),
        ("gemma", {"layer_types": ["full_attention"] * 3}, [], "layer_types is .*sliding_attention.* in base"),
        ("gemma", {"sliding_window": 16}, [], "sliding_window is 4096 in base and 16 in other"),
        ("mixtral", {"num_experts_per_tok": 1}, [], "num_experts_per_tok is 2 in base and 1 in other"),
    ],
)
def test_what_is_not_the_same_in_any_words(tmp_path, name, changes, drop, said):
    base = build(name)
    a, b = save(base, tmp_path / "base"), save(tuned(base, 1), tmp_path / "other")
    rewrite(b, changes, drop)
    with pytest.raises(MergeError, match=said):
        merge_linear([a, b], tmp_path / "out")


def test_an_absent_key_means_its_default_and_null_does_not():
    """Mistral without the key slides over 4096 tokens, with null it does not slide."""
    with_null, without = understood([{"model_type": "mistral", "sliding_window": None}, {"model_type": "mistral"}])
    assert (with_null["meaning"]["sliding_window"], without["meaning"]["sliding_window"]) == (None, 4096)


def test_a_model_that_transformers_does_not_know_is_compared_word_for_word(tmp_path):
    base = build()
    a, b = save(base, tmp_path / "a"), save(tuned(base, 1), tmp_path / "b")
    for folder in (a, b):
        rewrite(folder, {"model_type": "homemade", "architectures": ["Homemade"]})
    rewrite(b, {"rope_theta": 10000.0}, ["rope_parameters"])
    with pytest.raises(MergeError, match=r"literally \(.*homemade.*config.json of b by that of a"):
        merge_linear([a, b], tmp_path / "out")
    (b / "config.json").write_bytes((a / "config.json").read_bytes())
    merge_linear([a, b], tmp_path / "out")


def test_what_no_model_reads_is_a_note_only_where_two_files_contradict_each_other(tmp_path):
    base = build()
    a, b = save(base, tmp_path / "a"), save(tuned(base, 1), tmp_path / "b")
    rewrite(a, {"trained_by": "me", "torchscript": False})
    rewrite(b, {"trained_by": "you", "initializer_range": 0.5})
    notes = merge_linear([a, b], tmp_path / "out").report["notes"]
    assert [n.partition(":")[0] for n in notes if "config." in n] == ["config.initializer_range", "config.trained_by"]


def test_transformers_is_asked_in_a_process_of_its_own(tmp_path):
    base = build(num_hidden_layers=1)
    save(tuned(base, 1), tmp_path / "b")
    as_version_4(save(base, tmp_path / "a"), {"rope_theta": 10000.0})
    code = "import sys\nfrom hf_continual import merge_linear\nmerge_linear(['a', 'b'], 'out')\nprint('transformers' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.endswith("False\n")
