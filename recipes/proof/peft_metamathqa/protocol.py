"""Rows, answers and losses as PEFT's comparison on MetaMathQA defines them, written from its description."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import GenerationConfig

PROMPT = "Question: {query} Think step by step.\nAnswer:"
LONGEST = 1300  # characters of question and answer; longer rows are left out
BUCKET = 20  # batches that are sorted by length together
LENGTH = 768  # tokens of a row, a text, and an answer with its question
# What comes before an answer, in the order in which they are looked for.
BEFORE = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")


def rows_of(source: str, number: int | None = None, **given: Any) -> list[dict[str, Any]]:
    """The first rows of a JSON-lines file or of a data set on the Hub, which is then not downloaded as a whole."""
    if Path(source).is_file():
        rows = [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines()]
        return rows[:number]
    name, _, config = source.partition(":")
    streamed = load_dataset(name, config or None, streaming=True, **{"split": "train", **given})
    return list(streamed if number is None else streamed.take(number))


def training_rows(rows: Sequence[Mapping[str, str]], tokenizer: Any, batch: int, steps: int) -> Dataset:
    """The rows of all steps, in the order in which they are trained on.

    In order of the data set; each 20 batches are sorted from long to short. Trained are question and answer, and an end token
    except for the longest row of a batch.

    Args:
        rows: ``query`` and ``response``.
        tokenizer: The model's tokenizer.
        batch: Rows of a step.
        steps: Optimizer steps.

    Returns:
        ``input_ids`` and ``labels``.
    """
    short = [r for r in rows if len(f"{r['query']} {r['response']}") <= LONGEST][: batch * steps]
    if len(short) < batch * steps:
        raise SystemExit(f"{len(short)} training rows are short enough, {steps} steps of {batch} need {batch * steps}.")
    texts = [PROMPT.format(query=r["query"]) + r["response"] for r in short]
    tokens = [ids[:LENGTH] for ids in tokenizer(texts)["input_ids"]]
    made = []
    for start in range(0, len(tokens), batch * BUCKET):
        bucket = sorted(tokens[start : start + batch * BUCKET], key=len, reverse=True)
        for first in range(0, len(bucket), batch):
            rows_of_step = bucket[first : first + batch]
            longest = len(rows_of_step[0])
            made += [ids if len(ids) == longest else [*ids, tokenizer.eos_token_id] for ids in rows_of_step]
    return Dataset.from_list([{"input_ids": ids, "labels": list(ids)} for ids in made])


def answer_of(text: str) -> float | str | None:
    """The answer in a text: a number if it is one, else the words, None if the text gives no answer."""
    text = text.strip().rstrip(".!?")
    phrase = next((p for p in BEFORE if p in text), None)
    if phrase is None:
        return None
    said = text.rpartition(phrase)[2].strip().split("\n", 1)[0].strip(" .!?$%")
    number = as_number(said)
    return said if number is None else number


def as_number(said: str) -> float | None:
    """A decimal number or a fraction of two; None for anything else."""
    above, slash, below = said.partition("/")
    try:
        value = Decimal(above.strip())
        return float(value / Decimal(below.strip()) if slash else value)
    except (ArithmeticError, InvalidOperation, ValueError):
        return None


def is_right(said: str, wanted: str) -> bool:
    """Whether a text gives the same answer as the wanted one."""
    found = answer_of(said)
    return found is not None and found == answer_of(wanted)


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, str]], batch: int) -> list[str]:
    """What the model writes after each question, with the question."""
    said: list[str] = []
    for start in range(0, len(rows), batch):
        prompts = [PROMPT.format(query=r["question"]) for r in rows[start : start + batch]]
        ids = [i[:LENGTH] for i in tokenizer(prompts)["input_ids"]]
        inputs = tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding_side="left").to(model.device)
        how = GenerationConfig(cache_implementation="static", max_length=LENGTH, pad_token_id=tokenizer.eos_token_id)
        said += tokenizer.batch_decode(model.generate(**inputs, generation_config=how), skip_special_tokens=True)
    return said


@torch.inference_mode()
def text_loss(model: Any, tokenizer: Any, texts: Sequence[str], batch: int) -> float:
    """Mean loss of all tokens of texts but the first of each, in nats; long texts are cut."""
    losses = []
    for start in range(0, len(texts), batch):
        inputs = tokenizer(list(texts[start : start + batch]), truncation=True, max_length=LENGTH)
        inputs = tokenizer.pad(inputs, return_tensors="pt", padding_side="left").to(model.device)
        logits_BSV = model(**inputs).logits
        for logits_SV, ids_S, mask_S in zip(logits_BSV, inputs["input_ids"], inputs["attention_mask"], strict=True):
            own_SV, own_S = logits_SV[mask_S.bool()], ids_S[mask_S.bool()]
            losses.append(torch.nn.functional.cross_entropy(own_SV[:-1].float(), own_S[1:], reduction="none"))
    return float(torch.cat(losses).mean())
