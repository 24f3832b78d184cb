"""`diagnose` on tiny models: each verdict from models made for it, adapters, and the command."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_continual.diagnosis import diagnose
from hf_continual.diagnosis.recovery import teach
from tests import toy
from tests.first_hour.typed import typed

KEYS = 48
OPTIONS = dict(steps=10, learning_rate=1e-3, batch_size=16)


def facts(shift: int = 0) -> Dataset:
    """A table that cannot be guessed: the answer to a word is another word."""
    order = torch.randperm(KEYS, generator=torch.Generator().manual_seed(5 + shift)).tolist()
    return Dataset.from_list([{"prompt": f"w{i}", "completion": f" w{order[i]}"} for i in range(KEYS)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base: knows nothing; before: the table; other: another table in its place; hidden: a few steps of something new."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), toy.tokenizer()

    def keep(name, start, rows, steps, rate, batch):
        model = AutoModelForCausalLM.from_pretrained(folder / start)
        teach(model, tokenizer, rows, steps, rate, batch)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    toy.model(hidden_size=128, intermediate_size=256, num_hidden_layers=2).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    keep("before", "base", facts(), 60, 3e-3, KEYS)
    new = Dataset.from_list([{"prompt": f"w{i}", "completion": " w59"} for i in range(48, 58)])
    keep("hidden", "before", new, 3, 2e-3, 10)
    keep("other", "before", facts(1), 60, 3e-3, KEYS)
    facts().to_json(folder / "old.jsonl")
    return folder


def test_nothing_was_forgotten(folder):
    found = diagnose(folder / "before", folder / "before", facts(), folder / "base", margin=0.2, **OPTIONS)
    assert found.verdict == "none" and found.remedies == [] and found.confidence == 1
    assert found.scores["before"]["held"]["value"] == 1 and found.scores["base"]["held"]["value"] < 0.2
    assert all(p["score"] == 1 for p in found.line) and all(e["size"] == 0 for e in found.layers)
    assert all(e["cka"] == pytest.approx(1) for e in found.layers)


def test_what_is_hidden_is_told_from_what_is_gone(folder, tmp_path):
    hidden = diagnose(folder / "before", folder / "hidden", facts(), folder / "base", **OPTIONS)
    assert hidden.scores["after"]["held"]["value"] < 0.5
    assert hidden.verdict == "spurious", hidden.reason
    assert hidden.scores["recovered"]["held"]["value"] > 0.7 and hidden.scores["control"]["held"]["value"] < 0.2
    assert "train --model" in hidden.remedies[0].command and any("freeze" in r.command for r in hidden.remedies)
    options = {**OPTIONS, "steps": 30, "margin": 0.2}  # 24 rows exclude no less
    gone = diagnose(folder / "before", folder / "other", facts(), folder / "base", **options)
    assert gone.verdict == "real", gone.reason
    assert gone.scores["recovered"]["shown"]["value"] > 0.8 and "replay" in gone.remedies[-1].command
    assert [e["layer"] for e in gone.layers] == ["embed", *(f"layer.{i}" for i in range(2)), "final"]
    assert all(0 < e["angle"] <= 90 for e in gone.layers if e["layer"].startswith("layer."))
    assert [p["share"] for p in gone.line] == [0, 0.25, 0.5, 0.75, 1]
    assert gone.line[0]["nll"] == pytest.approx(gone.scores["before"]["held_nll"], abs=1e-5)
    assert gone.line[-1]["nll"] == pytest.approx(gone.scores["after"]["held_nll"], abs=1e-5)
    gone.write(tmp_path / "diagnosis.json")
    assert json.loads((tmp_path / "diagnosis.json").read_text())["verdict"] == "real"
    # The same again gives the same.
    again = diagnose(folder / "before", folder / "hidden", facts(), folder / "base", **OPTIONS)
    assert again.to_dict() == hidden.to_dict()


def test_without_a_control_or_teaching_it_stays_undecided(folder):
    alone = diagnose(folder / "before", folder / "hidden", facts(), **OPTIONS)
    assert alone.verdict == "undecided" and "base" in alone.reason and "no control" in alone.notes[0]
    assert "control" not in alone.scores and all(e["angle"] is None for e in alone.layers)
    untaught = diagnose(folder / "before", folder / "other", facts(), folder / "base", steps=1, learning_rate=1e-7)
    assert untaught.verdict == "undecided" and "did not teach" in untaught.reason


def test_adapters(folder, tmp_path):
    tokenizer = toy.tokenizer()
    for name, shift, steps in (("first", 0, 100), ("second", 1, 100)):
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder / "base"),
            LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        )
        model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        teach(model, tokenizer, facts(shift), steps, 5e-3, 48)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    found = diagnose(tmp_path / "first", tmp_path / "second", facts(), steps=5, learning_rate=5e-3)
    # The base is found in the adapter, so that there is a control and there are angles.
    assert "control" in found.scores and found.scores["before"]["held"]["value"] > 0.8
    assert all(e["angle"] is not None for e in found.layers if e["layer"].startswith("layer."))
    assert next(e for e in found.layers if e["layer"] == "embed")["size"] == 0
    assert found.line[-1]["nll"] == pytest.approx(found.scores["after"]["held_nll"], rel=1e-4)
    assert all("--base" in r.command for r in found.remedies if " merge " in r.command)
    upon = diagnose(folder / "before", tmp_path / "second", facts(), steps=2)  # an adapter put onto a full model
    assert upon.settings["learning_rate"] == 2e-4 and upon.line


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    line = (
        f"diagnose before hidden --rows old.jsonl --base base --steps 10 --learning-rate 1e-3 --out {tmp_path}/d.json"
    )
    code, out, err = typed(f"{line} --quiet", capsys)
    assert code == 0, err
    assert out.startswith("spurious (confidence") and out.count("\n") == 1
    code, out, _ = typed(f"{line} --json", capsys)
    assert code == 0 and json.loads(out) == json.loads((tmp_path / "d.json").read_text())
    code, out, _ = typed(line, capsys)
    assert "CKA" in out and "hf-continual train" in out and "on the line" in out
    for wrong, word in {
        "diagnose nowhere hidden --rows old.jsonl": "nowhere",
        "diagnose before hidden --rows gone.jsonl": "gone.jsonl",
        "diagnose before hidden --rows old.jsonl --base gone/x/y": "--base",
        "diagnose before hidden --rows old.jsonl --metric exact": "exact",
        "diagnose before hidden --rows old.jsonl --group who": "no such column",
        "diagnose before hidden --rows old.jsonl --limit 16 --margin 0": "margin",
    }.items():
        code, _, err = typed(wrong, capsys)
        assert code == 2 and word in err, (wrong, err)


def test_bad_numbers(folder):
    for option, value in (("steps", 0), ("batch_size", True), ("alpha", 1.0), ("learning_rate", -1.0)):
        with pytest.raises(ValueError, match=rf"diagnose\({option}="):
            diagnose(folder / "before", folder / "other", facts(), **{option: value})
    with pytest.raises(ValueError, match="make halves of 5 and 5 rows"):
        diagnose(folder / "before", folder / "other", facts().select(range(10)))
