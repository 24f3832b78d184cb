"""A tiny random model and invented rows for the smoke preset: they show that everything runs, and nothing else."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

LONGSEQ = ("dbpedia", "amazon", "yahoo", "agnews")
TRACE = ("C-STANCE", "FOMC", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten")
WORDS = [f"w{i}" for i in range(40)]
ASKED = ["Which?", "Choose one from the option.", "Option: w1, w2.", "Answer:"]


def write(file: Path, rows: list[dict[str, str]]) -> None:
    """Rows as JSON lines, or as a list if the file's name says so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rows) if file.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    file.write_text(text, encoding="utf-8")


def make_data(folder: Path) -> None:
    """Files with the names of the real ones; each task has words of its own as answers."""
    draw = random.Random(0)

    def words(number: int) -> str:
        return " ".join(draw.choices(WORDS, k=number))

    for i, task in enumerate(LONGSEQ):
        for split in ("train", "dev", "test"):
            rows = [
                {
                    "prompt": f"Which? Choose one from the option. Option: w1, w2.\n{words(6)}\nAnswer:",
                    "completion": f" {draw.choice(WORDS[i::8])}",
                }
                for _ in range(16)
            ]
            write(folder / "longseq" / f"{task}.{split}.jsonl", rows)
    for i, task in enumerate(TRACE):
        for split in ("train", "test"):
            rows = [{"prompt": f"Which?\n{words(6)}\nAnswer:", "answer": draw.choice(WORDS[i::8])} for _ in range(16)]
            write(folder / "trace" / task / f"{split}.json", rows)
    for split in ("train", "heldout"):
        write(folder / "general" / f"general.{split}.jsonl", [{"text": words(12)} for _ in range(16)])


def make_model(folder: Path) -> None:
    """A Llama of 4 layers and 32 channels with random weights, and a tokenizer of words separated by spaces."""
    pieces = sorted({word for text in ASKED for word in text.split()} | set(WORDS))
    known = {word: i for i, word in enumerate(["<pad>", "<eos>", *pieces])}
    words = Tokenizer(models.WordLevel(known, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(known), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=1,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def toy_world(out: Path) -> Path:
    """Make rows and model once; returns the model's folder."""
    make_data(out / "data")
    if not (out / "model" / "config.json").is_file():
        make_model(out / "model")
    return out / "model"
