"""PEFT's protocol: rows, answers, losses; and a dry run of all arms with a tiny model and invented rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import toy

ROOT = Path(__file__).parents[2]
PEFT = ROOT / "recipes" / "proof" / "peft_metamathqa"


@pytest.fixture
def protocol(monkeypatch):
    monkeypatch.syspath_prepend(str(PEFT))
    import protocol

    yield protocol
    sys.modules.pop("protocol", None)


def test_answers_are_read_as_numbers(protocol):
    assert protocol.answer_of("Answer: so it is\nThe answer is: 16") == 16.0
    assert protocol.answer_of("five.\n#### 1/4") == 0.25
    assert protocol.answer_of("The answer is: 50%.\nAnd more") == 50.0
    assert protocol.answer_of("The answer is: x + 1.") == "x + 1" and protocol.answer_of("none") is None
    assert protocol.is_right("The answer is: 0.50", "#### 1/2") and not protocol.is_right("half", "#### 1/2")
    assert protocol.answer_of("The answer is: 1/0") == "1/0"


def test_rows_are_sorted_in_buckets_and_end(protocol):
    class Letters:
        eos_token_id = 0

        def __call__(self, texts):
            return {
                "input_ids": [
                    [ord(c) for c in t.removeprefix("Question:  Think step by step.\nAnswer:")] for t in texts
                ]
            }

    rows = [{"query": "", "response": "a" * n} for n in (2, 1400, 5, 3, 5)]
    made = protocol.training_rows(rows, Letters(), 2, 2)
    assert [len(r["input_ids"]) for r in made] == [5, 5, 3, 3]  # 5, 5 | 3, 2 and an end token
    assert made["labels"] == made["input_ids"] and made[3]["input_ids"][-1] == 0
    with pytest.raises(SystemExit, match="4 training rows are short enough, 3 steps of 2 need 6"):
        protocol.training_rows(rows, Letters(), 2, 3)


def test_the_loss_is_that_of_all_tokens_of_single_texts(protocol):
    model, tokenizer = toy.model().eval(), toy.tokenizer()
    texts = list(toy.rows(number=5)["text"])
    total = count = 0.0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert protocol.text_loss(model, tokenizer, texts, 4) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_every_arm_runs_on_a_tiny_model(tmp_path):
    toy.model(max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    toy.tokenizer().save_pretrained(tmp_path / "model")

    def write(name, rows):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return str(tmp_path / name)

    pairs = list(toy.rows("prompt_completion", 24))
    data = {
        "--train": write("train.jsonl", [{"query": r["prompt"], "response": r["completion"]} for r in pairs]),
        "--test": write("test.jsonl", [{"question": r["prompt"], "answer": "#### 3"} for r in pairs[:3]]),
        "--wiki": write("wiki.jsonl", [{"text": t} for t in toy.rows(number=6)["text"]]),
        "--general": write("general.jsonl", [{"text": t} for t in toy.rows(number=12, seed=7)["text"]]),
    }
    options = [word for pair in data.items() for word in pair]
    command = [
        sys.executable, str(PEFT / "run.py"), "--out", str(tmp_path / "out"), "--model", str(tmp_path / "model"), "--dtype", "float32",
        "--steps", "4", "--batch", "4", "--batch-eval", "2", "--general-rows", "12", "--rate", "1e-2", *options,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {f.stem: json.loads(f.read_text()) for f in (tmp_path / "out" / "results").glob("*.json")}
    assert set(found) == {f"{arm}-seed0" for arm in ("lora", "replay", "gere", "kl_to_base")}
    assert all(
        r["forgetting"] == pytest.approx(r["wiki_after"] - r["wiki_before"]) and len(r["right"]) == 3
        for r in found.values()
    )
    assert len({round(r["wiki_before"], 6) for r in found.values()}) == 1
    assert len({r["wiki_after"] for r in found.values()}) == 4, "every arm trains differently"
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "train_loss" not in again.stdout
