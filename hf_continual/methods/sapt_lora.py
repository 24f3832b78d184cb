"""SAPT-LoRA: a LoRA pair per task, mixed for each row by attention that later tasks are held to.

Zhao et al., "SAPT: A Shared Attention Framework for Parameter-Efficient Continual Learning of Large Language Models", ACL
2024, https://arxiv.org/abs/2401.08295.

    q = LayerNorm(SiLU(W_2 W_1 max_s E[x_s])),  w = softmax(K q / sqrt(D))            shared attention, one w per row
    y = W x + alpha / r  sum_i w_i B_i A_i x                                          in every adapted layer
    loss = task loss + weight * sum_i KL(label_i || mean-of-rows w(rows of task i))   attentive reflection

Pairs and keys of earlier tasks are frozen; W_1, W_2 and the layer norm are shared and trained on, so the attention of earlier
tasks' rows would move. label_i is the mean attention of task i when it was learned, 0 for the tasks after it.

Differs from the published code: the model is decoder-only, its question is what comes before the first label; padding is not
pooled (theirs is); the attention in training stays in float32; the reflection counts once per optimizer step (theirs once per
micro-batch, not divided); gradients of lower layers pass through earlier pairs. Theirs generates pseudo rows by a generator
per task. The attention reads nothing of a row but its largest embedding per channel, and embeddings are frozen, so by default
these D values of a few rows stand for the rows, exactly: no row is stored, and none is generated.

Memory: nothing but the model's own. Each task adds its pairs and a key to the model, and to what is handed over ``kept`` rows
of D float32 values and a label.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor

from hf_continual.bounds import at_least, between, whole_number
from hf_continual.data.buffer import ORIGIN
from hf_continual.data.replay import RowType, shuffled
from hf_continual.data.rows import load_rows
from hf_continual.inference.kinds import tuner_of
from hf_continual.inference.sapt_lora import SaptLoraConfig, SaptLoraTuner
from hf_continual.methods.base import Batch, Forward, Method, Run, State
from hf_continual.paper import Paper
from hf_continual.tasks import name_among
from hf_continual.tensors.rank_gates import is_reentrant
from hf_continual.tensors.shared_attention import attention, pooled, query, reflection_loss

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from hf_continual.tasks import Task

__all__ = ["SAPTLoRA", "attention", "pooled", "query", "reflection_loss"]

logger = logging.getLogger(__name__)

TASK_COLUMN = ORIGIN[0]


@dataclass
class SAPTLoRA(Method):
    """Learn each task with its own LoRA pair, and mix all pairs for each row by attention over their keys.

    Idea: which pairs a row needs is learned with the pairs, and rows of earlier tasks are held to the pairs they had.
    Hooks: own modules, loss terms, task end. Cost: a step of LoRA of the summed rank (earlier pairs forward only), and the
    attention, which is a few thousand operations per row; no further forward pass.
    Relations: `OLoRA` adds all pairs with weight 1 and keeps them apart instead. Composes with methods for any trainable
    weights; what an earlier task's pair is, another method cannot change.
    Inference: the pairs are mixed there too, once per row in the first pass over its question, so the result is a folder for
    `load_sapt_lora` and not a plain checkpoint; it cannot be merged. Needs no `peft_config`; rows may not be packed.

    Args:
        r: Rank of each task's pair; 8 in the long sequences with T5, 4 with LLaMA.
        lora_alpha: The update is scaled by lora_alpha / r.
        lora_dropout: Dropout before the newest pair.
        target_modules: Layers that get pairs, as PEFT takes them: a regular expression, or names separated by commas; the
            authors adapt ``"q_proj,v_proj"``.
        hidden: Inner width of the query; the authors' is 100.
        weight: Of the reflection; the authors use 0.1 to 0.5 (T5) and 1 to 2 (LLaMA). 0 leaves the attention free.
        kept: Rows of each task whose pooled embeddings are kept for the reflection; 2 % of 1,000 in the paper.
        memory: In place of these: rows of earlier tasks, stored or generated, with the column ``memory_task``, as a plan's
            ``memory: kept`` has them. Tasks that are not among them keep their pooled embeddings.
        row_type: As in `Replay`.
        name: Prefix of the logged values, and of the files that are handed over.

    Raises:
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If one is out of range, rows of the memory are of no earlier task, or rows are packed.
    """

    r: int = 8
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    target_modules: str = "all-linear"
    hidden: int = 100
    weight: float = 0.1
    kept: int = 20
    memory: Dataset | str | list[dict[str, Any]] | None = None
    row_type: RowType = "same"
    name: str = "sapt_lora"  # pyrefly: ignore[bad-override]

    places: ClassVar[tuple[str, ...]] = ("memory",)
    leaves: ClassVar[str] = "mean attention and pooled embeddings of a few rows of the tasks so far"
    paper: ClassVar[Paper] = Paper(
        "SAPT: A Shared Attention Framework for Parameter-Efficient Continual Learning of Large Language Models",
        "Zhao et al.",
        2024,
        arxiv="2401.08295",
        venue="ACL 2024",
    )
    _tuner: Any = field(default=None, init=False, repr=False, compare=False)
    _inputs: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _labels: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _memory: dict[str, Dataset] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for key in ("r", "lora_alpha", "hidden", "kept"):
            whole_number("SAPTLoRA", key, getattr(self, key))
        between("SAPTLoRA", "lora_dropout", self.lora_dropout, 0, 1, "[")
        at_least("SAPTLoRA", "weight", self.weight, 0)
        empty = self.memory is None or (not isinstance(self.memory, str) and len(self.memory) == 0)
        self._rows = None if empty else load_rows(self.memory)  # pyrefly: ignore[bad-argument-type]
        if self._rows is not None and TASK_COLUMN not in self._rows.column_names:
            raise ValueError(
                f"SAPTLoRA(memory=...): the rows do not say which task they are from (columns {self._rows.column_names}). Give rows "
                f"with {TASK_COLUMN!r} (in a plan memory: kept), or leave memory out: pooled embeddings are kept then."
            )

    def adapter(self) -> PeftConfig:
        """The pair of the first task."""
        names = self.target_modules.split(",") if "," in self.target_modules else self.target_modules
        return SaptLoraConfig(
            r=self.r, lora_alpha=self.lora_alpha, lora_dropout=self.lora_dropout, target_modules=names, hidden=self.hidden
        )  # fmt: skip

    def reads_forward(self) -> bool:
        """Whether there is a reflection."""
        return self.weight > 0

    def replay(self, run: Run) -> None:
        """Tokenise the memory; nothing is mixed into the batches."""
        if self._rows is not None and self.weight:
            tasks = self._rows[TASK_COLUMN][:]
            for task in dict.fromkeys(tasks):
                rows: Any = self._rows.select([i for i, own in enumerate(tasks) if own == task])
                self._memory[task] = run.prepare(rows, self.row_type, f"{self.name}-{task}")

    def prepare_model(self, model: nn.Module, task: Task) -> None:
        """Freeze the pair and the key of the task before, and begin new ones."""
        tuner = tuner_of(model)
        if not isinstance(tuner, SaptLoraTuner):
            raise ValueError(
                f"SAPTLoRA trains LoRA pairs with keys, and the model is a {type(model).__name__} without them. Give SAPTLoRA to "
                f"ContinualTrainer with the base model, or with the folder that SAPTLoRA left."
            )
        self._tuner = tuner
        with torch.random.fork_rng(devices=[]):  # what is drawn here moves no other draw
            tuner.learn_task(name_among(task, tuner.tasks))
        if strangers := [t for t in self._memory if t not in tuner.tasks[:-1]]:
            raise ValueError(
                f"SAPTLoRA(memory=...): rows are of the task {strangers[0]!r}, and learned before {tuner.tasks[-1]!r} were "
                f"{', '.join(tuner.tasks[:-1]) or 'none'}. Give rows of those."
            )

    def load_task_state(self, state: State, run: Run) -> None:
        """Take over labels and pooled rows of the earlier tasks."""
        names = list(state["tasks"])
        width = self._tuner.shared.width
        for i, name in enumerate(names):
            inputs_MD = state[f"inputs/{i}"]
            if inputs_MD.shape[1] != width or name not in self._tuner.tasks:
                raise ValueError(
                    f"SAPTLoRA: what was kept of the task {name!r} ({inputs_MD.shape[1]} channels) does not belong to this model "
                    f"({width} channels, tasks {', '.join(self._tuner.tasks)}). Start from the folder it lies in, or without what was "
                    f"learned: ContinualConfig(fresh_methods=True)."
                )
            self._inputs[name], self._labels[name] = inputs_MD, state[f"label/{i}"]

    def begin_task(self, run: Run) -> None:
        """Lay out the reflection."""
        if is_reentrant(run.model):
            raise ValueError(
                "SAPTLoRA: the weights of the pairs come from outside the model's layers, and reentrant gradient checkpointing keeps "
                "no gradient of them. Set gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        earlier = self._tuner.tasks[:-1] if self.weight else []
        if unknown := [name for name in earlier if name not in self._labels]:
            logger.warning(
                "SAPTLoRA: what the attention of %s was is not known (fresh_methods, or the folder's continual/ is gone); it is "
                "not held there.", ", ".join(unknown),
            )  # fmt: skip
        self._tuner.reflection = [
            (self._reflected(name, run), self._label(name).to(run.device)) for name in earlier if name in self._labels
        ]

    def _reflected(self, name: str, run: Run) -> Tensor:
        rows = self._memory.get(name)
        return self._inputs[name].to(run.device) if rows is None else self._pooled(run.batches(rows))

    def _label(self, name: str) -> Tensor:
        known = self._labels[name]
        return torch.cat([known, known.new_zeros(len(self._tuner.tasks) - len(known))])

    def _pooled(self, batches: Iterable[Batch]) -> Tensor:
        return torch.cat([self._tuner.pool(batch) for batch in batches])

    def loss_terms(self, forward: Forward) -> dict[str, Tensor]:
        """The reflection, summed over the earlier tasks."""
        found = self._tuner.reflected
        return {} if found is None else {"reflection": self.weight * found}

    @torch.no_grad()
    def end_task(self, run: Run) -> None:
        """Keep the attention of the task's rows as it is now, and what a few of them pool to."""
        if not self.weight:
            return
        rows: Any = run.task_rows
        chosen = [shuffled(run.seed, len(rows), i) for i in range(min(len(rows), max(self.kept, 256)))]
        inputs_MD = self._pooled(run.batches(rows.select(chosen)))
        name = self._tuner.tasks[-1]
        self._labels[name] = self._tuner.shared(inputs_MD).mean(0).cpu()
        self._inputs[name] = inputs_MD[: self.kept].cpu()

    def needs_earlier_task(self) -> bool:
        """Its pair of factors and its attention are trained on a first task too."""
        return False

    def task_state(self, run: Run) -> State:
        """Labels and pooled rows of all tasks so far."""
        names = [name for name in self._tuner.tasks if name in self._labels]
        state: State = {"tasks": names} if names else {}
        for i, name in enumerate(names):
            state |= {f"inputs/{i}": self._inputs[name].contiguous(), f"label/{i}": self._labels[name].contiguous()}
        return state

    def release(self) -> None:
        """No reflection is computed any more."""
        if self._tuner is not None:
            self._tuner.reflection = []
