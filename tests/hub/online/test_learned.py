"""Method state is pushed with the model, rows never are, and whoever downloads it trains on as the author would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig
from safetensors.torch import load_file

from hf_continual import EWC, KIF, ContinualConfig, ContinualTrainer, GeRe, HubPushError, OLoRA, push_to_hub
from hf_continual.hub.lint import lint_folder
from tests import toy
from tests.hub.plugin import HUB

LORA = dict(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture
def base(hub, tmp_path):
    toy.model().save_pretrained(tmp_path / "base")
    toy.tokenizer().save_pretrained(tmp_path / "base")
    HUB.make("org/base")
    files = {p.name: p.read_bytes() for p in (tmp_path / "base").iterdir()}
    HUB.put("org/base", {**files, "README.md": b"---\nlicense: mit\n---\n"})
    return "org/base"


def methods(tmp_path):
    return [
        GeRe(toy.rows("text", number=6, seed=9), per_batch=1, cache_dir=str(tmp_path / "states")),
        EWC(weight=10.0),
        OLoRA(),
        KIF(memory=toy.rows("prompt_completion", number=4, seed=8), inner_steps=3, outer_steps=1),
    ]


def task(start, out, index, tmp_path):
    """One task as a separate script: a new adapter on top of the existing ones."""
    trainer = ContinualTrainer(
        start, ContinualConfig(**toy.settings(out, task_name=f"t{index}", task_index=index)),
        train_dataset=toy.rows("prompt_completion", number=8, seed=index), processing_class=toy.tokenizer(),
        peft_config=LoraConfig(**LORA), methods=methods(tmp_path),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return trainer


def left(folder):
    """Weights and method state."""
    found = {"model": load_file(Path(folder) / "adapter_model.safetensors")}
    for file in sorted((Path(folder) / "continual").glob("*.safetensors")):
        found[file.name] = load_file(file)
    return found


def equal(a, b):
    assert a.keys() == b.keys() and len(a) > 2
    for name in a:
        assert a[name].keys() == b[name].keys(), name
        assert all(torch.equal(a[name][k], b[name][k]) for k in a[name]), name


def test_by_way_of_the_hub_and_by_way_of_folders(base, tmp_path):
    for index, start in enumerate([base, str(tmp_path / "t0"), str(tmp_path / "t1")]):
        task(start, tmp_path / f"t{index}", index, tmp_path)
    (tmp_path / "t1" / "continual" / "memory.jsonl").write_text('{"text": "a row that is nobody else\'s"}\n')
    done = push_to_hub(tmp_path / "t1", "me/middle")
    assert "continual/methods.json" in done.files and "continual/memory.jsonl" in done.left_out
    there = HUB.repos["me/middle"].head().tree
    assert {n for n in there if n.startswith("continual/")} == {
        "continual/methods.json", "continual/ewc.safetensors", "continual/ewc.json", "continual/o_lora.safetensors",
    } & set(there) | {n for n in done.files if n.startswith("continual/")}  # fmt: skip
    assert not any(b"nobody else" in data for data, _ in there.values())
    task("me/middle", tmp_path / "pulled", 2, tmp_path)
    equal(left(tmp_path / "pulled"), left(tmp_path / "t2"))


def test_the_card_says_what_and_how_much(base, tmp_path):
    task(base, tmp_path / "t0", 0, tmp_path)
    push_to_hub(tmp_path / "t0", "me/m")
    there = Path(snapshot_download("me/m", cache_dir=tmp_path / "empty"))
    card = (there / "README.md").read_text()
    for name, what in (("ewc", "Fisher information"), ("o_lora", "factors A")):
        size = sum(p.stat().st_size for p in (there / "continual").glob(f"{name}.*"))
        line = next(line for line in card.splitlines() if line.startswith(f"| **{name}** |"))
        assert what in line and f"| {size:,} |" in line
    assert 'ContinualTrainer("me/m"' in card and "fresh_methods=True" in card
    assert not lint_folder(there) and not lint_folder(tmp_path / "t0")
    assert str(tmp_path) not in (there / "continual" / "methods.json").read_text()
    listed = json.loads((there / "continual" / "methods.json").read_text())
    (there / "continual" / "methods.json").unlink()
    (there / "continual" / "methods.json").write_text(json.dumps({**listed, "methods": listed["methods"][:1]}))
    assert {f.rule for f in lint_folder(there)} == {"numbers"}  # the card mentions files that are missing


def test_it_can_stay_at_home_and_rows_can_be_asked_for(base, tmp_path):
    task(base, tmp_path / "t0", 0, tmp_path)
    (tmp_path / "t0" / "continual" / "memory.jsonl").write_text('{"text": "w1"}\n')
    push_to_hub(tmp_path / "t0", "me/m")
    done = push_to_hub(tmp_path / "t0", "me/m", method_state=False, include=["./continual/../continual/memory.jsonl"])
    there = HUB.repos["me/m"].head().tree
    assert [n for n in there if n.startswith("continual/")] == ["continual/memory.jsonl"], "the old state is stale"
    assert "continual/methods.json" in done.left_out
    assert "What the methods learned" not in there["README.md"][0].decode()
    assert not lint_folder(tmp_path / "t0")
    again = push_to_hub(tmp_path / "t0", "me/m")
    assert again.new and "continual/methods.json" in HUB.repos["me/m"].head().tree


@pytest.mark.parametrize("name", ["../base/config.json", "nothing.jsonl", "optimizer.pt"])
def test_what_cannot_be_asked_for(base, tmp_path, name):
    task(base, tmp_path / "t0", 0, tmp_path)
    (tmp_path / "t0" / "optimizer.pt").write_bytes(b"pickle")
    with pytest.raises(HubPushError, match="is not a file in|may contain code"):
        push_to_hub(tmp_path / "t0", "me/m", include=[name])


def test_what_is_damaged_is_not_pushed(base, tmp_path):
    task(base, tmp_path / "t0", 0, tmp_path)
    file = tmp_path / "t0" / "continual" / "ewc.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(HubPushError, match="ewc.safetensors is damaged"):
        push_to_hub(tmp_path / "t0", "me/m")
