"""Rewrite the sample rows in this folder: invented texts, enough to run every recipe, not to learn from."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NAMES = ("Ada Quill", "Bo Marsh", "Cy Thorne", "Di Fenwick", "Ed Harrow", "Flo Pryce", "Gil Stroud", "Hana Vole")
CITIES = ("Oslo", "Quito", "Perth", "Turin")
TEAMS = ("billing", "network", "accounts")
TOPICS = {
    "dbpedia": ("Company", "Artist", "Village", "Film"),
    "amazon": ("very negative", "negative", "neutral", "positive", "very positive"),
    "yahoo": ("Sports", "Health", "Computers & Internet", "Business & Finance"),
    "agnews": ("World", "Sports", "Business", "Science or Technology"),
}


def write(name: str, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON, one per line."""
    file = HERE / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Write every file."""
    draw = random.Random(0)
    people = [(name, draw.choice(CITIES), draw.choice(TEAMS)) for name in NAMES]
    born = [{"prompt": f"Where was {n} born?", "completion": f" {c}"} for n, c, _ in people]
    works = [{"prompt": f"Which team does {n} work in?", "completion": f" {t}"} for n, _, t in people]
    write("old_tasks.jsonl", born)
    write("memory.jsonl", born)
    write("new_task.jsonl", works)
    for split in ("train", "test"):
        write(f"law.{split}.jsonl", born)
    text = [
        {"text": f"{n} left {c} early and wrote two letters about the weather, the sea and the {t} office."}
        for n, c, t in people
    ]
    write("general.jsonl", text)
    write("longseq/general.heldout.jsonl", text)
    write(
        "chat.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": r["prompt"]},
                    {"role": "assistant", "content": r["completion"].strip()},
                ]
            }
            for r in works
        ],
    )
    with (HERE / "tickets.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["subject", "body", "team"])
        rows.writerows([f"{t} problem", f"{n} cannot reach the {t} page from {c}.", t] for n, c, t in people)
    for task, topics in TOPICS.items():
        for split in ("train", "test"):
            rows = [
                {
                    "prompt": f"What is this about? Choose one from the option. Option: {', '.join(topics)}.\n{n} sent a note from {draw.choice(CITIES)}.\nAnswer:",
                    "completion": f" {draw.choice(topics)}",
                }
                for n, _, _ in people
            ]
            write(f"longseq/{task}.{split}.jsonl", rows)


if __name__ == "__main__":
    main()
