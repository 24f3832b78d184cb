"""Every row of the table of errors: before a tensor is read, naming model, tensor, values and a way out."""

from __future__ import annotations

import errno
import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_continual import merge_linear, merge_with_recall
from hf_continual.merging.engine import plan as plan_module
from hf_continual.merging.errors import MergeError
from hf_continual.merging.methods.recall.merge import RecallMergeError
from tests import toy
from tests.merging.world import adapter, build, family, save, tuned

EQUAL = {"default": [0.5, 0.5]}
ROWS = [{"input_ids": list(range(4 + i, 14 + i))} for i in range(20)]


@pytest.fixture
def world(tmp_path):
    return tmp_path, *family(tmp_path)


def refused(world, error, said, models=None, **options):
    """The call raises, and leaves no files."""
    tmp, _, a, b = world
    before = sorted(p.name for p in tmp.iterdir())
    options = {"weights": EQUAL, **options}
    with pytest.raises(error, match=said):
        merge_with_recall([a, b] if models is None else models, tmp / "out", **options)
    assert sorted(p.name for p in tmp.iterdir()) == before


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(folder, change):
    file = folder / "model.safetensors"
    stored = load_file(file)
    change(stored)
    save_file(stored, file, {"format": "pt"})


def test_arguments(world):
    tmp, base, a, _ = world
    refused(world, ValueError, r"models=\[\]: give a list", models=[])
    refused(world, ValueError, "give a list of at least one", models=str(a))
    refused(world, ValueError, "m1 is the only model, and there is no base to merge it with: give base=", models=[a])
    refused(world, ValueError, "include_base=False there is nothing", models=[a], base=base, include_base=False)
    refused(world, ValueError, "include_base=True needs base=", include_base=True)
    refused(world, ValueError, "anchor=2 is out of range: there are 2 models", anchor=2)
    refused(world, ValueError, "anchor='m7' is none of the models: m1, m2", anchor="m7")
    refused(world, FileNotFoundError, "'/nowhere' is neither a folder nor a valid Hub id", models=["/nowhere", a])
    lora = adapter(build(), tmp / "lora", 1)
    refused(world, ValueError, "lora is an adapter: give base=, the full model it was trained on", models=[lora, a])
    refused(world, ValueError, "is an adapter, but the base must be the full model", base=lora)
    with pytest.raises(ValueError, match="m1' is one of the models"):
        merge_linear([a, base], a, overwrite=True)


def test_options(world):
    _, _, a, b = world
    out = world[0] / "out"
    for options, said in (
        ({"dtype": "int8"}, "dtype='int8': it must be one of float64, float32"),
        ({"max_shard_size": "many"}, "max_shard_size='many': give a number of bytes, or a string such as '5GB'"),
        ({"vocab": "union"}, "vocab='union': it must be one of 'strict', 'extend'"),
        ({"adapter_rank": 0}, "adapter_rank=0: a rank must be at least 1"),
        ({"adapter_rank": 4}, "adapter_rank=4 is for output='adapter'"),
        ({"weights": [1.0]}, "has 1 numbers for 2 models"),
        ({"weights": [1.0, -1.0]}, "sum to 0.0; an average needs a positive sum.*task_arithmetic"),
    ):
        with pytest.raises(ValueError, match=said):
            merge_linear([a, b], out, **options)
    with pytest.raises(TypeError, match="there is no option 'shards'; the options are output, adapter_rank"):
        merge_linear([a, b], out, shards=3)
    with pytest.raises(MergeError, match="output='adapter' is not possible: none of the models is an adapter"):
        merge_linear([a, b], out, output="adapter")


def test_given_weights(world):
    refused(
        world,
        ValueError,
        r"weights\['embed'\] has 3 numbers for 2 models \(m1, m2\)",
        weights={"default": [0.2, 0.3, 0.5]},
    )
    refused(world, ValueError, r"sum to 0.9", weights={"default": [0.5, 0.4]})
    refused(world, ValueError, "have no entry for 'embed' and none for 'default'", weights={"layer.0": [0.5, 0.5]})
    refused(world, ValueError, r"name the groups layer.9; the model has", weights={"layer.9": [0.5, 0.5], **EQUAL})


def test_architectures(world):
    tmp, _, a, b = world
    other = save(build("qwen"), tmp / "qwen")
    refused(
        world, RecallMergeError, "architecture mismatch: m1 has model_type='llama' and qwen 'qwen2'", models=[a, other]
    )
    for key, value in (("num_attention_heads", 2), ("rms_norm_eps", 1e-3), ("hidden_act", "gelu")):
        edit_config(b, **{key: value})
        refused(world, RecallMergeError, f"architecture mismatch: {key} is .* in m1 and {value!r} in m2.*same {key}")
        shutil.copy(a / "config.json", b / "config.json")
    edit_config(b, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    refused(world, RecallMergeError, "architecture mismatch: rope_parameters is .* in m1 and .*500000.0.* in m2")


def test_tensors_missing_and_extra(world):
    _, _, _, b = world
    edit_tensors(
        b, lambda t: [t.pop(f"model.layers.{i}.mlp.{p}_proj.weight") for i in range(3) for p in ("up", "down")]
    )
    said = r"m1 has 6 tensors that m2 does not have \(model.layers.0.mlp.down_proj.weight, .* and 1 more\)\. Only"
    refused(world, RecallMergeError, said)
    edit_tensors(b, lambda t: t.update({"model.extra": torch.ones(2)}))
    refused(
        world,
        RecallMergeError,
        r"m2 has 1 tensors that m1 does not have \(model.extra\), and m1 has 6 that m2 does not have \(.*\)\.",
    )


def test_shapes_and_vocabularies(world):
    _, _, _, b = world
    edit_tensors(b, lambda t: t.update({"model.norm.weight": torch.ones(31)}))
    refused(world, RecallMergeError, r"shape mismatch: 'model.norm.weight' is \[32\] in m1 but \[31\] in m2")
    edit_tensors(
        b, lambda t: t.update({"model.norm.weight": torch.ones(32), "model.embed_tokens.weight": torch.ones(70, 32)})
    )
    said = r"shape mismatch: 'model.embed_tokens.weight' is \[\d+, 32\] in m1 and \[70, 32\] in m2.*vocab='extend'"
    refused(world, RecallMergeError, said)
    whole = load_file(world[2] / "model.safetensors")
    edit_tensors(b, lambda t: t.update({**whole, "model.norm.weight": torch.ones(32, dtype=torch.int64)}))
    refused(world, RecallMergeError, "'model.norm.weight' is F32 in m1 and I64 in m2")


def test_tokenizers(world):
    _, _, _, b = world
    file = b / "tokenizer.json"
    data = json.loads(file.read_text())
    vocab = data["model"]["vocab"]
    vocab["w5"], vocab["w6"] = vocab["w6"], vocab["w5"]
    file.write_text(json.dumps(data))
    refused(
        world, RecallMergeError, "tokenizer mismatch between m1 and m2: id 9 is 'w5' in one and 'w6'.*of one tokenizer"
    )
    vocab["w5"], vocab["w6"] = vocab["w6"], vocab["w5"]
    vocab["new"] = len(toy.VOCABULARY)
    file.write_text(json.dumps(data))
    refused(world, RecallMergeError, "tokenizer mismatch between m1 and m2: .* tokens.*vocab='extend'")


def test_blocks_that_cannot_be_found(world):
    """Of an architecture that transformers knows, 7 blocks of which 3 are stored would be refused as incomplete."""
    _, _, a, b = world
    for folder in (a, b):
        edit_config(folder, num_hidden_layers=7, model_type="homemade", architectures=["Homemade"])
    refused(
        world,
        RecallMergeError,
        r"No list of 7 blocks was found among .*weights=\{'default': \[...\]\}",
        weights=None,
        calibration=ROWS,
    )
    result = merge_with_recall([a, b], world[0] / "out", weights=EQUAL)
    assert result.groups == ("default",)
    assert any("was not checked: the installed transformers does not know" in n for n in result.report["notes"])


@pytest.mark.parametrize(("name", "said"), [("pytorch_model.bin", r"pickled \(.bin\)"), ("model.gguf", "GGUF")])
def test_pickles_and_gguf(world, name, said):
    _, _, _, b = world
    (b / "model.safetensors").rename(b / name)
    refused(world, RecallMergeError, f"holds {said} weights.*save_pretrained")


def test_quantised_absent_and_damaged_files(world):
    _, _, _, b = world
    edit_config(b, quantization_config={"quant_method": "gptq"})
    refused(world, RecallMergeError, r"m2 is quantised \(gptq\).*Give the 16-bit model")
    edit_config(b, quantization_config=None)
    file = b / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    refused(world, RecallMergeError, "model.safetensors is cut off or damaged: '.*' should take .* bytes")
    file.write_bytes(b"no such file")
    refused(world, RecallMergeError, "is not a safetensors file, or was cut off")
    file.unlink()
    refused(world, FileNotFoundError, "m2 lacks model.safetensors")
    (b / "config.json").unlink()
    refused(world, FileNotFoundError, "m2 holds neither config.json nor adapter_config.json")


def test_calibration(world):
    refused(
        world, ValueError, "calibration is missing: give texts of the newest.*calibration_mode='self'", weights=None
    )
    refused(world, ValueError, "calibration_mode='none'", weights=None, calibration_mode="none")
    refused(world, ValueError, "num_typical=0", weights=None, calibration=ROWS, num_typical=0)
    refused(world, ValueError, "nonblock='mean'", weights=None, calibration=ROWS, nonblock="mean")
    refused(world, ValueError, "needs the base among the models", weights=None, calibration=ROWS, nonblock="base")
    refused(world, ValueError, "bandwidth=0", weights=None, calibration=ROWS, bandwidth=0)
    for calibration, error, said in (
        ([], ValueError, "calibration is empty"),
        ([{"input_ids": [3]}] * 4, ValueError, "all 4 calibration texts have fewer than 2 tokens"),
        ("one text", TypeError, "is one text; give a list"),
        ([{"question": "w1"}], TypeError, "a calibration row has the columns 'question'; it needs 'text', 'messages'"),
    ):
        with pytest.raises(error, match=said):
            merge_with_recall(list(world[2:]), world[0] / "out", calibration=calibration)


def test_output_folders(world):
    tmp, _, a, b = world
    (tmp / "out").mkdir()
    (tmp / "out" / "precious").write_text("mine")
    with pytest.raises(FileExistsError, match="out is not empty.*overwrite=True"):
        merge_linear([a, b], tmp / "out")
    with pytest.raises(FileExistsError, match="out is not empty"):
        merge_with_recall([a, b], tmp / "out", calibration=ROWS)
    assert (tmp / "out" / "precious").read_text() == "mine"
    merge_linear([a, b], tmp / "out", overwrite=True)
    assert not (tmp / "out" / "precious").exists() and (tmp / "out" / "model.safetensors").is_file()
    (tmp / "file").write_text("")
    with pytest.raises(FileExistsError, match="file is a file"):
        merge_linear([a, b], tmp / "file")
    (tmp / "empty").mkdir()
    merge_linear([a, b], tmp / "empty")


def test_too_little_disk(world, monkeypatch):
    monkeypatch.setattr(plan_module, "free_space", lambda _: 1000)
    with pytest.raises(
        OSError, match=r"out needs .* kB .[0-9,]+ bytes. but only 1 kB .1,000 bytes. are free.*another disk"
    ) as found:
        merge_linear(list(world[2:]), world[0] / "out")
    assert found.value.errno == errno.ENOSPC and not (world[0] / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(world, value):
    tmp, _, a, b = world
    edit_tensors(b, lambda t: t["model.layers.1.mlp.up_proj.weight"].view(-1).__setitem__(77, value))
    with pytest.raises(
        MergeError, match=rf"'model.layers.1.mlp.up_proj.weight' of .*m2 is {value} at element 77.*leave it out"
    ):
        merge_linear([a, b], tmp / "out")
    assert not (tmp / "out").exists()


@pytest.mark.parametrize("output", ["model", "adapter"])
def test_an_adapter_that_is_not_finite(tmp_path, output):
    base = build()
    folder, a, b = save(base, tmp_path / "base"), adapter(base, tmp_path / "a", 1), adapter(base, tmp_path / "b", 2)
    file = b / "adapter_model.safetensors"
    found = load_file(file)
    name = next(n for n in found if "lora_B" in n)
    found[name].view(-1)[3] = float("nan")
    save_file(found, file, metadata={"format": "pt"})
    with pytest.raises(
        MergeError, match=rf"'{name}' of .*b is nan at element 3. An adapter with such a number is broken"
    ):
        merge_linear([a, b], tmp_path / "out", base=folder, output=output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copied_tensor_that_is_not_finite(tmp_path, dtype):
    """An adapter leaves most of its base unchanged; broken tensors there are not copied silently."""
    base = build(dtype=dtype)
    folder, a = save(base, tmp_path / "base"), adapter(base, tmp_path / "a", 1)
    edit_tensors(folder, lambda t: t["model.norm.weight"].__setitem__(2, float("inf")))
    with pytest.raises(MergeError, match=r"'model.norm.weight' of .*base is inf at element 2"):
        merge_linear([a], tmp_path / "out", base=folder, output="model")


def test_a_result_that_overflows_its_type(world):
    tmp, _, a, b = world
    for folder in (a, b):
        edit_tensors(folder, lambda t: t["model.norm.weight"].fill_(7e4))
    with pytest.raises(
        MergeError, match=r"'model.norm.weight' would get a number that F16 cannot hold.*dtype='bfloat16'"
    ):
        merge_linear([a, b], tmp / "out", dtype="float16")


def test_warnings_name_what_is_likely_wrong(tmp_path):
    base = build()
    same = [save(base, tmp_path / n) for n in ("a", "b")]
    with pytest.warns(UserWarning) as found:
        merge_with_recall(same, tmp_path / "same", calibration=ROWS)
    said = [str(w.message) for w in found]
    assert any("a and b are the same weights" in s for s in said)
    assert any("within 0.001 of equal in every layer" in s for s in said)
    moved = save(tuned(base, 1, 0.3), tmp_path / "c")
    with pytest.warns(UserWarning, match="every other model's similarity is below 0.001: the bandwidth is too small"):
        merge_with_recall([same[0], moved], tmp_path / "small", calibration=ROWS, bandwidth=1e-4)
    with pytest.warns(UserWarning, match="There is only one calibration text"):
        merge_with_recall([same[0], moved], tmp_path / "one", calibration=ROWS[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_with_recall([same[0], moved], tmp_path / "fine", calibration=ROWS)
