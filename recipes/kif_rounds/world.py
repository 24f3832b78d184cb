"""A world of invented words, rows of its tasks, and a small model that has read its texts; all seeded, seconds on one core.

Each word has a hidden value for each of five aspects. Texts are lists of words that mostly share one value; questions name an aspect and
show words, most of which share a value of it, and the answer is that value's label. In the base model's texts the questions have random
answers: it knows words and format, but no task. A task is one aspect, and its labels belong to it alone.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from hf_continual.atomic_files import write_lines

ASPECTS = ("taste", "weight", "origin", "age", "sound")
VALUES = 4  # of each aspect
SHOWN, SHARED = 6, 4  # words of a question, and how many of them share the asked value
TEXT, TEXT_SHARED = 12, 10  # the same of a text
GUESSES = 0.25  # of the base model's texts are questions
SIZES: dict[str, int] = {
    "words": 240, "channels": 128, "layers": 3, "pretraining": 1200, "batch": 64, "train": 1000, "test": 150, "general": 60,
}  # fmt: skip


class World:
    """The words of a seed and their hidden values.

    Args:
        seed: Seed of words, values and everything drawn from them.
        words: Number of words.
    """

    def __init__(self, seed: int, words: int) -> None:
        draw = random.Random(f"words {seed}")
        parts = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
        names = ["".join(draw.sample(parts, 3)) for _ in range(3 * words)]
        self.seed = seed
        self.words = list(dict.fromkeys(names))[:words]
        self.labels = {a: [f"{a[:2]}{'ABCDEF'[v]}" for v in range(VALUES)] for a in ASPECTS}
        # A permutation of equal parts for each aspect: each value has the same number of words, aspects are independent.
        self.groups: dict[str, list[list[str]]] = {}
        for aspect in ASPECTS:
            mixed = draw.sample(self.words, len(self.words))
            self.groups[aspect] = [mixed[v::VALUES] for v in range(VALUES)]

    def listed(self, draw: random.Random, aspect: str, value: int, number: int, shared: int) -> str:
        """Words, `shared` of which have a value; the others have any."""
        chosen = draw.sample(self.groups[aspect][value], shared) + draw.sample(self.words, number - shared)
        draw.shuffle(chosen)
        return " ".join(chosen)

    def row(self, draw: random.Random, aspect: str) -> dict[str, str]:
        """A question and its answer."""
        value = draw.randrange(VALUES)
        asked = self.listed(draw, aspect, value, SHOWN, SHARED)
        return {"prompt": f"{aspect} ? {asked} =", "completion": f" {self.labels[aspect][value]}"}

    def text(self, draw: random.Random) -> str:
        """Words that mostly share a value."""
        return self.listed(draw, draw.choice(ASPECTS), draw.randrange(VALUES), TEXT, TEXT_SHARED)

    def guess(self, draw: random.Random) -> str:
        """A question with a random answer."""
        answer = draw.choice([label for own in self.labels.values() for label in own])
        return f"{self.row(draw, draw.choice(ASPECTS))['prompt']} {answer}"

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A token per word."""
        labels = [label for own in self.labels.values() for label in own]
        known = ["<pad>", "<eos>", "?", "=", *ASPECTS, *labels, *self.words]
        made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<pad>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def write_rows(world: World, folder: Path, sizes: dict[str, int]) -> None:
    """Training and test rows of each task, and held-out texts."""
    folder.mkdir(parents=True, exist_ok=True)
    for aspect in ASPECTS:
        for split in ("train", "test"):
            draw = random.Random(f"{split} {aspect} {world.seed}")
            write_lines(folder / f"{aspect}.{split}.jsonl", [world.row(draw, aspect) for _ in range(sizes[split])])
    draw = random.Random(f"general {world.seed}")
    write_lines(folder / "general.jsonl", [{"text": world.text(draw)} for _ in range(sizes["general"])])


def pretrain(world: World, folder: Path, sizes: dict[str, int]) -> float:
    """Train the base model on texts that are never repeated; returns its last loss in nats per token."""
    tokenizer = world.tokenizer()
    set_seed(world.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=sizes["channels"], intermediate_size=2 * sizes["channels"], bos_token_id=1,
            num_hidden_layers=sizes["layers"], num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=sizes["pretraining"], pct_start=0.1)
    draw, loss = random.Random(f"read {world.seed}"), torch.zeros(())
    for _ in range(sizes["pretraining"]):
        texts = [
            f"{(world.guess if draw.random() < GUESSES else world.text)(draw)} <eos>" for _ in range(sizes["batch"])
        ]
        batch: Any = tokenizer(texts, return_tensors="pt", padding=True)
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss.item()


def make(seed: int, folder: Path, sizes: dict[str, int]) -> Path:
    """Rows and base model of a seed, once; returns the model's folder."""
    world, done = World(seed, sizes["words"]), folder / "model" / "tokenizer_config.json"
    if not done.is_file():
        write_rows(world, folder / "data", sizes)
        print(
            f"seed {seed}: the base model's last loss is {pretrain(world, folder / 'model', sizes):.2f} nats",
            flush=True,
        )
    return folder / "model"
