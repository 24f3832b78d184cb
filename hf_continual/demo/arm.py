"""One arm of the demo: the three tasks in a row, with or without methods. Runs in its own process."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as hf_logging

from hf_continual.data.biography import people, questions
from hf_continual.demo.general_text import HELD_OUT
from hf_continual.evaluation.exact_match import teacher_forced
from hf_continual.evaluation.general import general_loss
from hf_continual.evaluation.result import Scored
from hf_continual.methods.base import Method
from hf_continual.methods.freeze import FreezeLayers
from hf_continual.methods.recadam import RecAdam
from hf_continual.methods.replay import Replay
from hf_continual.stream.folders import train_tasks
from hf_continual.tasks import Task, TaskStream
from hf_continual.tensors.layers import find_blocks
from hf_continual.trainer.state import last_complete_checkpoint
from hf_continual.trainer.trainer import ContinualTrainer
from hf_continual.trainer.trl_trainer import SFTConfig, SFTTrainer

# Disjoint people, one kind of question each: what the base model cannot know, asked in three formats.
TASKS = (("birth city", "birth_city"), ("field of study", "major"), ("employer", "company"))

# First words of the general text that the base model writes itself.
OPENINGS = (
    "The", "In", "A", "When", "Most", "It", "After", "There", "Many", "For", "As", "One", "This", "People", "During",
    "How",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Settings that both arms share, so that they differ only in their methods.

    Args:
        model: Folder or Hub id of the base model.
        out: The demo's output folder.
        seed: Seed of people, order and adapters.
        number: People, and so rows, of each task.
        steps: Optimizer steps of each task.
        batch: Rows per step.
        learning_rate: Peak learning rate of the adapter.
        every: Steps between two points of the curves.
        ratio: Fraction of the continual arm's tokens that come from rows of earlier tasks.
        general: Fraction of the continual arm's tokens that are general text.
        bottom: Fraction of the blocks that the continual arm freezes.
        pull: Fraction of the way back to the anchor that RecAdam pulls per step.
        dtype: dtype that the model is trained in.
    """

    model: str
    out: str
    seed: int = 0
    number: int = 24
    steps: int = 45
    batch: int = 8
    learning_rate: float = 1e-3
    every: int = 15
    ratio: float = 0.3
    general: float = 0.2
    bottom: float = 0.2
    pull: float = 0.01
    dtype: str = "bfloat16"

    def stream(self) -> TaskStream:
        """The tasks; training and test rows are the same, since facts are learned, not rules."""
        everyone = people(self.number * len(TASKS), self.seed)
        tasks = []
        for i, (name, attribute) in enumerate(TASKS):
            rows = questions(everyone[i * self.number : (i + 1) * self.number], [attribute])
            tasks.append(Task(name, i, rows, rows))
        return TaskStream(tasks)


def rows_of(task: Task) -> Any:
    """The rows a task is scored with."""
    return task.test


class Watch(TrainerCallback):
    """Writes the arm's progress as lines of JSON, and points of its curves."""

    def __init__(self, arm: Arm, task: Task) -> None:
        self.arm, self.task = arm, task
        self.trainer: SFTTrainer | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """One line per logged step."""
        kept = {k: v for k, v in (logs or {}).items() if k == "loss" or k.endswith(("/loss", "/share"))}
        self.arm.say(task=self.task.index, step=state.global_step, **kept)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A point of the curves every few steps."""
        if state.global_step % self.arm.settings.every == 0 and self.trainer is not None:
            self.arm.measure(self.trainer.model, self.task.index, state.global_step)


class Arm:
    """Trains and measures one arm.

    Args:
        name: ``"sequential"`` or ``"continual"``.
        settings: Settings that both arms share.
    """

    def __init__(self, name: str, settings: Settings) -> None:
        self.name, self.settings = name, settings
        self.folder = Path(settings.out) / name
        self.folder.mkdir(parents=True, exist_ok=True)
        tokenizer: Any = AutoTokenizer.from_pretrained(settings.model)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer = tokenizer
        self.stream = settings.stream()
        self.curves = self.folder / "curves.jsonl"

    def say(self, **what: Any) -> None:
        """Report progress to the parent process."""
        with (self.folder / "progress.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), **what}) + "\n")

    def measure(self, model: Any, task: int, step: int) -> dict[str, Any]:
        """Score the tasks seen so far and the general text; add a point to the curves."""
        point: dict[str, Any] = {"at": task * self.settings.steps + step, "general": None, "exact": {}, "nll": {}}
        for seen in self.stream.tasks[: max(task, 0) + 1]:
            answers = teacher_forced(model, self.tokenizer, rows_of(seen))
            point["exact"][seen.name] = answers.score.value
            point["nll"][seen.name] = answers.nll.value if answers.nll else None
        point["general"] = general_loss(model, self.tokenizer, HELD_OUT).score.value
        with self.curves.open("a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")
        return point

    def base(self) -> dict[str, Any]:
        """Scores of the base model on all tasks, measured once."""
        file = self.folder / "base.json"
        if not file.is_file():
            self.say(task=0, step=0, doing="base model")
            model = self._load()
            scores = {t.name: teacher_forced(model, self.tokenizer, rows_of(t)) for t in self.stream}
            measured = {
                "exact": {n: a.score.to_dict() for n, a in scores.items()},
                "nll": {n: a.nll.to_dict() for n, a in scores.items() if a.nll},
                "general": general_loss(model, self.tokenizer, HELD_OUT).score.to_dict(),
            }
            file.write_text(json.dumps(measured, indent=1), encoding="utf-8")
        return json.loads(file.read_text(encoding="utf-8"))

    def run(self) -> None:
        """All tasks, then the merged model in ``model/`` and the measurements in ``results.json``."""
        base = self.base()
        matrix = train_tasks(self.stream, self.folder, self)
        last = self.folder / self.stream[len(self.stream) - 1].folder
        self.say(task=len(self.stream), step=0, doing="saving")
        model: Any = PeftModel.from_pretrained(self._load(), last)
        final = {t.name: teacher_forced(model, self.tokenizer, rows_of(t)) for t in self.stream}
        merged = model.merge_and_unload()
        merged.save_pretrained(self.folder / "model")
        self.tokenizer.save_pretrained(self.folder / "model")
        results = {
            "arm": self.name,
            "settings": asdict(self.settings),
            "base": base,
            "matrix": matrix.scores,
            "nll": {n: a.nll.to_dict() for n, a in final.items() if a.nll},
            "general": general_loss(merged, self.tokenizer, HELD_OUT).score.to_dict(),
        }
        (self.folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        self.say(task=len(self.stream), step=0, doing="done")

    def _load(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.settings.model, dtype=self.settings.dtype)

    def learn(self, task: Task, parent: Path | None, folder: Path) -> dict[str, Any]:
        """Train one task from the adapter of the task before; see `hf_continual.stream.folders.Learner`."""
        settings, model = self.settings, self._load()
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear") if parent is None else None
        if parent is not None:
            model = PeftModel.from_pretrained(model, parent, is_trainable=True)
        args = SFTConfig(
            str(folder),
            per_device_train_batch_size=settings.batch,
            max_steps=settings.steps,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=3,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            activation_checkpointing=False,
            padding_free=True,  # short questions batched with longer general text would be mostly padding
            max_length=None,
            logging_steps=1,
            save_steps=settings.every,
            save_total_limit=1,
            report_to=[],
            disable_tqdm=True,
            seed=settings.seed,
        )
        watch = Watch(self, task)
        common: dict[str, Any] = {
            "model": model, "args": args, "train_dataset": task.train, "processing_class": self.tokenizer,
            "peft_config": lora, "callbacks": [watch],
        }  # fmt: skip
        # The one line that changes between the arms:
        if self.name == "sequential":
            trainer = SFTTrainer(**common)
        else:
            trainer = ContinualTrainer(**common, methods=self.methods(task))
        trainer.remove_callback(PrinterCallback)
        watch.trainer = trainer
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
        trainer.save_model(str(folder))
        return {"name": task.name, "steps": trainer.state.global_step}

    def methods(self, task: Task) -> list[Method]:
        """The continual arm's methods against forgetting."""
        blocks = len(find_blocks(self._load_meta()))
        methods: list[Method] = [
            FreezeLayers(bottom=max(1, round(self.settings.bottom * blocks))),
            RecAdam(anneal="none", pull=self.settings.pull),
            Replay(self.own_words(), ratio=self.settings.general, row_type="text", name="general"),
        ]
        old = [t.train for t in self.stream.tasks[: task.index]]
        if old:
            rows: Dataset = concatenate_datasets([rows for rows in old if rows is not None])
            methods.insert(0, Replay(rows, ratio=self.settings.ratio))
        return methods

    def own_words(self) -> str:
        """General text that the base model writes itself before training, once; no corpus is needed."""
        file = self.folder / "own_words.jsonl"
        if not file.is_file():
            self.say(task=0, step=0, doing="base model writes general text")
            model = self._load().eval()
            torch.manual_seed(self.settings.seed)
            prompts = [self.tokenizer(word)["input_ids"][:1] for word in OPENINGS for _ in range(4)]
            with torch.inference_mode():
                written = model.generate(
                    torch.tensor(prompts), attention_mask=torch.ones(len(prompts), 1, dtype=torch.long),
                    do_sample=True, temperature=1.0, top_k=0, max_new_tokens=64,
                    pad_token_id=self.tokenizer.pad_token_id,
                )  # fmt: skip
            texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts if len(text) > 20)
            file.with_suffix(".partial").write_text(lines, encoding="utf-8")
            file.with_suffix(".partial").rename(file)
        return str(file)

    def _load_meta(self) -> Any:
        from transformers import AutoConfig

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.settings.model))

    def columns(self, task: Task | None) -> list[Task]:
        """Every task seen is scored."""
        return list(self.stream.tasks[: (len(self.stream) if task is None else task.index + 1)])

    def score(self, folder: Path | None, tasks: Sequence[Task], done: Callable[[str, Scored], None]) -> None:
        """Exact match of the saved adapter on each task."""
        model: Any = self._load()
        model = model if folder is None else PeftModel.from_pretrained(model, folder)
        for task in tasks:
            done(task.name, teacher_forced(model, self.tokenizer, rows_of(task)))


def main() -> None:
    """Run an arm: ``python -m hf_continual.demo.arm NAME SETTINGS.json``."""
    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.basicConfig(level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    settings = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    Arm(sys.argv[1], Settings(**settings)).run()


if __name__ == "__main__":
    main()
