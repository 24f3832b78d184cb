"""The field's task sequences as entries of a plan: the Standard and the Long Sequence benchmark, and TRACE.

Standard (4 tasks, Zhang et al. 2015) and Long Sequence (15 tasks, Razdaibiedina et al. 2023) in the orders that
O-LoRA, SAPT and Recurrent-KIF use. A `folder` of published files gives the papers' own prompts; without one, the
rows come from the Hub with prompts worded here, and the scores are not comparable to the papers'.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

STANDARD_ORDERS: dict[int, tuple[str, ...]] = {
    1: ("dbpedia", "amazon", "yahoo", "agnews"),
    2: ("dbpedia", "amazon", "agnews", "yahoo"),
    3: ("yahoo", "amazon", "agnews", "dbpedia"),
}
_LONG = "mnli cb wic copa qqp boolqa rte imdb yelp amazon sst-2 dbpedia agnews multirc yahoo"
LONG_ORDERS: dict[int, tuple[str, ...]] = {
    1: tuple(_LONG.split()),
    2: tuple("multirc boolqa wic mnli cb copa qqp rte imdb sst-2 dbpedia agnews yelp amazon yahoo".split()),
    3: tuple("yelp amazon mnli cb copa qqp rte imdb sst-2 dbpedia agnews yahoo multirc boolqa wic".split()),
}

_STARS = ("very negative", "negative", "neutral", "positive", "very positive")
_TRUE = ("False", "True")
_NLI = ("entailment", "neutral", "contradiction")

# Hub id (with configuration), test split, labels in the order of the dataset's numbers, prompt.
HUB: dict[str, tuple[str, str, tuple[str, ...], str]] = {
    "agnews": ("fancyzhx/ag_news", "test", ("World", "Sports", "Business", "Science or Technology"), "News: {text}\nTopic of this news:"),
    "amazon": ("SetFit/amazon_reviews_multi_en", "test", _STARS, "Review: {text}\nSentiment of this review:"),
    "yelp": ("Yelp/yelp_review_full", "test", _STARS, "Review: {text}\nSentiment of this review:"),
    "dbpedia": (
        "fancyzhx/dbpedia_14", "test",
        ("Company", "Educational Institution", "Artist", "Athlete", "Office Holder", "Mean of Transportation", "Building",
         "Natural Place", "Village", "Animal", "Plant", "Album", "Film", "Written Work"),
        "{title}\n{content}\nKind of thing described:",
    ),
    "yahoo": (
        "community-datasets/yahoo_answers_topics", "test",
        ("Society & Culture", "Science & Mathematics", "Health", "Education & Reference", "Computers & Internet", "Sports",
         "Business & Finance", "Entertainment & Music", "Family & Relationships", "Politics & Government"),
        "{question_title}\n{question_content}\n{best_answer}\nTopic of this question:",
    ),
    "imdb": ("stanfordnlp/imdb", "test", ("Bad", "Good"), "Review: {text}\nGood or bad:"),
    "sst-2": ("nyu-mll/glue:sst2", "validation", ("Bad", "Good"), "Sentence: {sentence}\nGood or bad:"),
    "mnli": ("nyu-mll/glue:mnli", "validation_matched", _NLI, "Premise: {premise}\nHypothesis: {hypothesis}\nRelation:"),
    "qqp": ("nyu-mll/glue:qqp", "validation", _TRUE, "First: {question1}\nSecond: {question2}\nSame meaning:"),
    "rte": ("nyu-mll/glue:rte", "validation", ("entailment", "contradiction"), "Premise: {sentence1}\nHypothesis: {sentence2}\nRelation:"),
    "cb": ("aps/super_glue:cb", "validation", ("entailment", "contradiction", "neutral"), "Premise: {premise}\nHypothesis: {hypothesis}\nRelation:"),
    "copa": ("aps/super_glue:copa", "validation", ("A", "B"), "{premise}\nWhat is the {question}?\nA: {choice1}\nB: {choice2}\nAnswer:"),
    "wic": ("aps/super_glue:wic", "validation", _TRUE, "Word: {word}\nFirst: {sentence1}\nSecond: {sentence2}\nSame sense:"),
    "boolqa": ("aps/super_glue:boolq", "validation", _TRUE, "{passage}\nQuestion: {question}\nTrue or false:"),
    "multirc": ("aps/super_glue:multirc", "validation", _TRUE, "{paragraph}\nQuestion: {question}\nCandidate: {answer}\nTrue or false:"),
}  # fmt: skip
_LABEL_COLUMN = {"yahoo": "topic"}

# Metric and epochs of TRACE's tasks, in the order of its paper. Its SARI for 20Minuten is replaced by ROUGE-L.
TRACE = {
    "C-STANCE": ("lower_exact", 5), "FOMC": ("lower_exact", 3), "MeetingBank": ("rougeL", 7), "Py150": ("similarity", 5),
    "ScienceQA": ("lower_exact", 3), "NumGLUE-cm": ("lower_exact", 5), "NumGLUE-ds": ("lower_exact", 5),
    "20Minuten": ("rougeL", 7),
}  # fmt: skip
_TRACE_TOKENS = {"MeetingBank": 256, "20Minuten": 256, "Py150": 128, "ScienceQA": 128}


def standard(order: int = 1, folder: str | None = None) -> list[dict[str, Any]]:
    """The four-task Standard benchmark.

    Args:
        order: 1, 2 or 3, as O-LoRA numbers them.
        folder: Published files, see `published`; None reads the Hub.

    Returns:
        Entries of a plan's `tasks`.
    """
    return _sequence(STANDARD_ORDERS, order, folder, "standard")


def long_sequence(order: int = 1, folder: str | None = None) -> list[dict[str, Any]]:
    """The 15-task Long Sequence benchmark.

    Args:
        order: 1, 2 or 3 (O-LoRA's orders 4, 5 and 6).
        folder: Published files, see `published`; None reads the Hub.

    Returns:
        Entries of a plan's `tasks`.
    """
    return _sequence(LONG_ORDERS, order, folder, "long_sequence")


def _sequence(orders: dict[int, tuple[str, ...]], order: int, folder: str | None, name: str) -> list[dict[str, Any]]:
    if order not in orders:
        raise ValueError(f"{name}: order={order!r} is not one of the papers' orders {', '.join(map(str, orders))}.")
    return [hub(task) if folder is None else published(task, folder) for task in orders[order]]


def hub(task: str) -> dict[str, Any]:
    """A task of the Long Sequence benchmark from the Hub, with prompts worded here."""
    source, split, labels, prompt = HUB[task]
    columns = {"prompt": prompt, "completion": " {" + _LABEL_COLUMN.get(task, "label") + "}"}
    return {
        "name": task,
        "train": source,
        "test": source,
        "test_split": split,
        "columns": columns,
        "labels": list(labels),
    }


def published(task: str, folder: str) -> dict[str, Any]:
    """A task from published files: ``TASK.SPLIT.jsonl`` (prompt, completion) or ``SPLIT/TASK.json`` (instruction, input, output).

    Args:
        task: Name of the task.
        folder: Folder of the files.

    Returns:
        An entry of a plan's `tasks`.

    Raises:
        FileNotFoundError: If there are no training or no scoring rows.
    """
    flat, nested = "{task}.{split}.jsonl", "{split}/{task}.json"
    found: dict[str, Path] = {}
    kind = flat
    for layout in (flat, nested):
        for split in ("train", "dev", "test"):
            if (path := Path(folder) / layout.format(task=task, split=split)).is_file():
                found.setdefault(split, path)
                kind = layout
    test = found.get("test", found.get("dev"))
    if "train" not in found or test is None:
        raise FileNotFoundError(
            f"{folder} has no {'training' if 'train' not in found else 'test or dev'} rows of {task!r}: looked for "
            f"{flat.format(task=task, split='train')} and {nested.format(task=task, split='train')} below {Path(folder).resolve()}."
        )
    if "test" not in found:
        logger.warning("%s has no test rows (%s): its dev rows are scored instead.", task, folder)
    entry: dict[str, Any] = {"name": task, "train": str(found["train"]), "test": str(test)}
    if kind == nested:
        entry["columns"] = {"prompt": "{instruction}{input}", "completion": " {output}"}
    return entry


def trace(folder: str, tasks: list[str] | None = None) -> list[dict[str, Any]]:
    """A TRACE-style folder: one folder per task with ``train.json`` and ``test.json`` of ``{"prompt", "answer"}``.

    Args:
        folder: Parent of the tasks' folders.
        tasks: Names in order; by default TRACE's eight, or all folders by name if none of them is there.

    Returns:
        Entries of a plan's `tasks`, with TRACE's metrics and epochs where it has them.

    Raises:
        FileNotFoundError: If a file is missing.
    """
    there = sorted(
        p.name for p in Path(folder).glob("*/") if (p / "train.json").is_file() or (p / "train.jsonl").is_file()
    )
    names = tasks or [t for t in TRACE if t in there] or there
    entries = []
    for name in names:
        files = {}
        for split in ("train", "test"):
            choices = [Path(folder) / name / f"{split}{suffix}" for suffix in (".json", ".jsonl")]
            files[split] = next((str(p) for p in choices if p.is_file()), None)
            if files[split] is None:
                raise FileNotFoundError(
                    f"{choices[0]} does not exist; the folder {folder} contains {', '.join(there) or 'no task'}."
                )
        entry: dict[str, Any] = {"name": name, **files, "columns": {"prompt": "prompt", "completion": "answer"}}
        if name in TRACE:
            match, epochs = TRACE[name]
            entry["metric"] = {"generated": {"match": match, "max_new_tokens": _TRACE_TOKENS.get(name, 16)}}
            entry["sft"] = {"num_train_epochs": epochs}
        entries.append(entry)
    if not entries:
        raise FileNotFoundError(
            f"{folder} contains no task: no folder with a train.json was found in {Path(folder).resolve()}."
        )
    return entries


BENCHMARKS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "standard": standard,
    "long_sequence": long_sequence,
    "trace": trace,
}
