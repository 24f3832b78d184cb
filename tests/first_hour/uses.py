"""Wrong calls in Python, each with its error and the words it must contain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig

from hf_continual import (
    ContinualConfig,
    ContinualTrainer,
    FreezeLayers,
    Method,
    RecAdam,
    Replay,
    Task,
    TaskStream,
    kif_fuse,
    merge,
    render_card,
    train_stream,
)
from hf_continual.data.rows import load_rows
from hf_continual.methods.table import build_methods
from tests import toy

ROWS = [{"prompt": "w1", "completion": " w2"}]


def trainer(
    methods: Any = (), model: Any = None, rows: Any = None, peft: Any = None, **config: Any
) -> ContinualTrainer:
    """A trainer on the toy model."""
    return ContinualTrainer(
        toy.model() if model is None else model,
        ContinualConfig(**toy.settings("out", **config)),
        train_dataset=toy.rows("prompt_completion", number=4) if rows is None else rows,
        processing_class=toy.tokenizer(),
        peft_config=peft,
        methods=methods,
    )


class Nameless(Method):
    """No name."""


class Cited(Method):
    """A paper that is a string."""

    name = "cited"
    paper: ClassVar[Any] = "Somebody, 2020"


class Parametrised(Method):
    """A hyper-parameter that it does not keep under its name."""

    name = "parametrised"

    def __init__(self, weight: float) -> None:
        self.strength = weight


@dataclass
class OtherArguments(Method):
    """A hook with different arguments than the protocol's."""

    name = "other"

    def loss_terms(self) -> dict[str, Any]:  # pyrefly: ignore[bad-override]
        return {}


LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")

USES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "no name": (lambda: trainer([Nameless()]), ["Nameless has no name", "name = 'nameless'"]),
    "paper is a text": (lambda: trainer([Cited()]), ["Cited.paper", "hf_continual.Paper"]),
    "a hyper-parameter that is lost": (
        lambda: trainer([Parametrised(1.0)]),
        ["Parametrised", "'weight'", "@dataclass", "self.weight"],
    ),
    "other arguments": (lambda: trainer([OtherArguments()]), ["OtherArguments.loss_terms", "forward"]),
    "a class": (lambda: trainer([RecAdam]), ["holds the class RecAdam", "RecAdam(...)"]),
    "one method, no list": (lambda: trainer(RecAdam()), ["single RecAdam", "methods=[RecAdam(...)]"]),
    "a name": (lambda: trainer("recadam"), ["'recadam'", "ContinualConfig(methods="]),
    "twice": (lambda: trainer([RecAdam()], methods_="recadam"), ["methods_"]),
    "methods in both": (lambda: _both(), ["given twice"]),
    "two optimizers": (lambda: trainer([RecAdam(), RecAdam()]), ["'recadam'"]),
    "earlier_tasks in Python": (lambda: Replay("earlier_tasks", ratio=0.1), ["earlier_tasks", "plan"]),
    "kept in Python": (lambda: Replay("kept", ratio=0.1), ["kept", "plan"]),
    "replay of a missing file": (lambda: Replay("gone.jsonl", ratio=0.1), ["'gone.jsonl' does not exist", "looked in"]),
    "replay of a broken file": (lambda: Replay("broken.jsonl", ratio=0.1), ["broken.jsonl, line 9"]),
    "replay of nothing": (lambda: Replay([], ratio=0.1), ["has no rows"]),
    "replay ratio": (lambda: Replay(ROWS, ratio=1.5), ["ratio=1.5", "between 0 and 1"]),
    "replay without a share": (lambda: Replay(ROWS), ["ratio"]),
    "freeze": (lambda: FreezeLayers(bottom=-1), ["bottom=-1"]),
    "freeze too many": (lambda: trainer([FreezeLayers(bottom=9)]), ["bottom=9", "4 blocks"]),
    "unknown method": (lambda: build_methods("rply"), ["Unknown method 'rply'"]),
    "missing hyper-parameter": (lambda: build_methods("replay"), ["methods.replay needs 'rows'"]),
    "wrong hyper-parameter": (lambda: build_methods({"replay": {"row": 1}}), ["Did you mean 'rows'?"]),
    "methods is a number": (lambda: build_methods(3), ["got int"]),
    "negative rate": (lambda: ContinualConfig("out", learning_rate=-1.0), ["learning_rate is -1.0", "at least 0"]),
    "empty batch": (
        lambda: ContinualConfig("out", per_device_train_batch_size=0),
        ["per_device_train_batch_size is 0"],
    ),
    "minutes": (lambda: ContinualConfig("out", max_minutes=0), ["max_minutes=0", "above 0"]),
    "task index": (lambda: ContinualConfig("out", task_index=-1), ["task_index=-1"]),
    "unknown way": (lambda: ContinualConfig("out", from_adapter="stak"), ["from_adapter='stak'", "stack"]),
    "old spelling": (lambda: ContinualConfig("out", evaluation_strategy="no"), ["evaluation_strategy"]),
    "no rows": (lambda: trainer(rows=load_rows(ROWS).select([])), ["0 rows"]),
    "splits": (lambda: trainer(rows={"train": load_rows(ROWS)}), ["splits train", "data['train']"]),
    "missing folder": (lambda: trainer(model="/nowhere/m"), ["/nowhere/m does not exist"]),
    "missing model": (lambda: trainer(model="nowhere"), ["no folder nowhere here", "Check the spelling"]),
    "a file as model": (lambda: trainer(model="afile"), ["afile", "is a file and not a folder"]),
    "stack without an adapter": (
        lambda: trainer(model="model", from_adapter="stack"),
        ["is not one", "Drop it"],
    ),
    "stack without options": (
        lambda: trainer(model="adapter", from_adapter="stack"),
        ["stack", "peft_config=LoraConfig"],
    ),
    "continue with options": (
        lambda: trainer(model="adapter", from_adapter="continue", peft=LORA),
        ["continue", "Drop them"],
    ),
    "task names": (lambda: TaskStream([Task("a"), Task("a")]), ["'a'", "must be unique"]),
    "no tasks": (lambda: TaskStream([]), ["at least one task"]),
    "a stream that is a list": (lambda: train_stream([Task("a")]), ["TaskStream"]),  # pyrefly: ignore
    "no plan": (lambda: train_stream("gone.yaml"), ["'gone.yaml'"]),
    "a plan without model": (
        lambda: train_stream({"tasks": [{"name": "a", "train": ROWS}], "output_dir": "o"}),
        ["'model' is missing"],
    ),
    "rows of numbers": (lambda: load_rows([1, 2]), ["dictionaries", "int"]),  # pyrefly: ignore
    "rows that are not rows": (lambda: load_rows(3), ["int"]),  # pyrefly: ignore
    "unknown merge": (lambda: merge("tie", ["model", "model"], "m"), ["tie"]),
    "merge without models": (lambda: merge("linear", [], "m"), ["model"]),
    "merge of a missing folder": (lambda: merge("linear", ["./gone", "model"], "m"), ["./gone"]),
    "kif without importance": (lambda: kif_fuse("model", "model", "m"), ["importance"]),
    "card of a missing folder": (lambda: render_card(Path("gone")), ["gone"]),
}


def _both() -> None:
    ContinualTrainer(toy.model(), ContinualConfig(**toy.settings("out", methods="recadam")), methods=[RecAdam()])
