"""Batched generation against one row at a time, and teacher forcing against generation: ratios of one run.

    python tests/benchmarks/evaluation.py [MODEL] [--rows 64] [--new-tokens 64]

MODEL is a folder or Hub id; by default the embedded SmolLM2-135M. Two kinds of rows: questions about invented people,
which it answers in a few words or not at all (a batch saves little: a processor is busy with one prompt already), and
beginnings of sentences, which it continues to the limit. In float32, where padding only changes the last bits, the
answers must be identical.
"""

from __future__ import annotations

import argparse
import time

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_continual.data.biography import biography_rows
from hf_continual.evaluation.exact_match import generated, teacher_forced


def timed(call):
    """Result and seconds of a call."""
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


def taught_answers(model, tokenizer, rows, limit):
    """Rows of which half have the model's own answer as completion, so that half are right."""
    said = generated(model, tokenizer, rows, 32, limit).rows
    own = [{"prompt": r["prompt"], "completion": s.prediction} for r, s in zip(rows, said, strict=True)]
    return rows.from_list([own[i] if i % 2 == 0 else rows[i] for i in range(len(rows))])


def openings(number):
    """Beginnings of sentences on arbitrary topics, all different."""
    subjects = [
        "The river",
        "A teacher",
        "My neighbour",
        "The old bridge",
        "Every winter",
        "The museum",
        "A small dog",
        "The train",
    ]
    places = [
        "in the north",
        "near the harbour",
        "behind the school",
        "on the island",
        "at the market",
        "in the valley",
        "by the lake",
        "in the capital",
    ]
    return Dataset.from_list(
        [{"prompt": f"{subjects[i % 8]} {places[i // 8 % 8]}", "completion": " is"} for i in range(number)]
    )


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.model is None:
        from hf_continual.demo.model import embedded_model

        args.model = str(embedded_model())
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    kinds = {"questions": biography_rows(args.rows, attributes=["birth_city"]), "openings": openings(args.rows)}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
        generated(model, tokenizer, kinds["openings"].select([0]), max_new_tokens=2)
        for kind, rows in kinds.items():
            one, alone = timed(lambda: generated(model, tokenizer, rows, 1, args.new_tokens))
            tokens = sum(len(tokenizer(r.prediction)["input_ids"]) for r in one.rows) / args.rows
            print(f"{dtype}, {args.rows} {kind}: {tokens:.0f} new tokens on average, at most {args.new_tokens}")
            for size in (8, 32, 64):
                many, together = timed(lambda: generated(model, tokenizer, rows, size, args.new_tokens))
                same = sum(a.prediction == b.prediction for a, b in zip(one.rows, many.rows, strict=True))
                print(
                    f"  batch {size:3}: {alone / together:5.1f} x one by one; identical answers {same} of {args.rows}"
                )
            mixed = taught_answers(model, tokenizer, rows, 16)
            forced, fast = timed(lambda: teacher_forced(model, tokenizer, mixed, 32))
            greedy, slow = timed(lambda: generated(model, tokenizer, mixed, 32))
            agree = sum(a == b for a, b in zip(forced.right, greedy.right, strict=True))
            print(
                f"  teacher forcing: {slow / fast:5.1f} x generation; the same verdict on {agree} of {args.rows} rows, "
                f"{sum(greedy.right)} of them right"
            )


if __name__ == "__main__":
    main()
