r"""LFPT5: a soft prompt that rehearses with its own samples and is distilled from its earlier predictions.

Qin and Joty, "LFPT5: A Unified Framework for Lifelong Few-shot Language Learning Based on Prompt Tuning of T5", ICLR 2022,
https://arxiv.org/abs/2110.07298.

One soft prompt learns every task, each from where the last one left it. It answers questions and writes samples of its tasks,
and on the samples of earlier tasks it is distilled from the prompt as it was (eq. 3 and 4):

    L = (1 - kd) (L_QA + lambda L_LM) + kd KL(p_before || p),        lambda = lm_weight, kd = distill

with KL the mean over the answer tokens of the samples in a micro-batch. Without samples, as in the first task, kd is 0.

This is a port to decoder-only models: there is no encoder to read a sample while the decoder writes another, so samples are
written from a text marker, as in LAMOL. The prompt stands before the text (PEFT's prompt tuning), theirs after it. The published
code sums the KL over a batch, so that its weight grows with the batch; the mean does not. Samples are wanted as a share of the
rows, not two for each class, and a sample's label is not checked against a list.

No teacher is kept: what the earlier prompt says about a sample never changes, so its last hidden states are recorded once, before
the first step, and meet the frozen head in training. Memory: the size of a hidden state for each answer token of the samples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn

from hf_continual.bounds import between
from hf_continual.data.replay import ReplayRows
from hf_continual.methods.base import Forward, Run
from hf_continual.methods.pseudo_rehearsal import PseudoRehearsal
from hf_continual.paper import Paper
from hf_continual.tasks import Task
from hf_continual.tensors.head import (
    finish_of,
    head_differs,
    head_tensors,
    logits_function,
    plain_model,
    recorded_logits,
)
from hf_continual.tensors.imitation import logit_divergence
from hf_continual.tensors.reference import as_reference, last_hidden, own_logits, virtual_tokens

logger = logging.getLogger(__name__)

Logits = Callable[[Tensor], Tensor]


@dataclass
class LFPT5(PseudoRehearsal):
    """Train one soft prompt on task after task, with samples that it writes itself and distillation from the earlier prompt.

    Idea: a few thousand trained numbers hold all tasks, if what they said about earlier ones is kept.
    Hooks: rows, loss terms, task end. Cost: that of `LAMOL`; one pass over the samples before the first step, and the head
    once more for their answer tokens.
    Relations: `LAMOL` without the distillation. Give ``peft_config=PromptTuningConfig(...)`` to the first task's trainer and
    continue that prompt in the later ones. On other weights the same loss is computed, and a warning says that it is not the
    published method; a head that is trained itself is then copied. Composes with everything. FSDP and ZeRO-3 are refused.

    Args:
        gamma: Samples to write, as a fraction of the task's rows. 0: none, and nothing is distilled.
        lm_weight: lambda, weight of the text format; 0.25 in the published code.
        top_k: Number of likeliest tokens to draw from, 64 in the published code; 0: all.
        repetition_penalty: Above 1, tokens that were written are less likely to be written again; 2.5 in the published code.
        tries: Maximum number of times that missing well-formed samples are written.
        max_new_tokens: Maximum number of tokens of a sample; None: of the longest row of the earlier tasks.
        batch_rows: Samples written at once on each process. Other numbers draw other samples.
        gen_marker: Text that begins a sample. No row may hold its tokens.
        answer_marker: Text between question and answer.
        task_markers: Whether the name of the task is part of the first marker.
        count_invented: Whether hashes of the rows are handed over, see `LAMOL`.
        distill: kd, fraction of the distillation in the loss, from 0 to below 1; 0.01 in the published code.
        name: Prefix of the logged values, and of the files handed to the next task.

    Raises:
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If one is out of range, rows hold a marker or several answers, or what an earlier task left does not fit.
    """

    top_k: int = 64
    repetition_penalty: float = 2.5
    distill: float = 0.01
    name: str = "lfpt5"  # pyrefly: ignore[bad-override]

    taps: ClassVar[tuple[str, ...]] = ("last_hidden_state",)
    paper: ClassVar[Paper] = Paper(
        "LFPT5: A Unified Framework for Lifelong Few-shot Language Learning Based on Prompt Tuning of T5",
        "Qin and Joty",
        2022,
        arxiv="2110.07298",
        venue="ICLR 2022",
    )
    _before: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)
    _heads: tuple[Logits, Logits] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        between("LFPT5", "distill", self.distill, 0, 1, closed="[")

    def reads_row_ids(self) -> bool:
        """To find the samples in a micro-batch."""
        return self.gamma != 0 and self.distill != 0

    def prepare_model(self, model: nn.Module, task: Task) -> None:
        """Warn if something other than a soft prompt is trained."""
        if self.lm_weight and not virtual_tokens(model):
            logger.warning(
                "LFPT5 trains a soft prompt, but here %s is trained: the loss is the same, the method is not the published one. "
                "Give peft_config=PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=100).",
                f"an adapter ({type(model.active_peft_config).__name__})" if hasattr(model, "active_peft_config") else "the model",
            )  # fmt: skip

    def replay(self, run: Run) -> ReplayRows | None:
        """The second row of each pair; refuses packed rows, of which the first alone would have the prompt before it."""
        if virtual_tokens(run.model) and "seq_lengths" in run.task_rows.column_names:
            raise ValueError(
                "LFPT5: the rows are packed, and PEFT puts a soft prompt before the first row of a pack only: the others would be "
                "learned without it. Set packing=False."
            )
        return super().replay(run)

    def edit_rows(self, run: Run, rows: Dataset) -> Dataset:
        """Add the samples, and record what the model says about them before the first step."""
        edited = super().edit_rows(run, rows)
        if self._pseudo and self.distill and not self._before:
            self._record(run, self._pseudo)
        return edited

    def _record(self, run: Run, samples: list[dict[str, list[int]]]) -> None:
        """The last hidden states that predict the answers, and the heads that make logits of them."""
        with as_reference(run.model, "task_start"), run.autocast():
            first = samples[0]["input_ids"]
            problem = head_differs(run.model, last_hidden(run.model, first), own_logits(run.model, first))
            if problem:
                raise ValueError(f"LFPT5: {problem}, so nothing can be distilled. Use LAMOL, which needs no logits.")
            for row in samples:
                hidden_SD = last_hidden(run.model, row["input_ids"])
                self._before.append(hidden_SD[predicting(row["labels"])].cpu())
        live = logits_function(run.model)
        head: Any = plain_model(run.model).get_output_embeddings()
        if not any(p.requires_grad for p in head.parameters()):
            self._heads = live, live
            return
        kept = {name: t.to(run.device) for name, t in head_tensors(run.model).items()}
        self._heads = live, recorded_logits(kept["head"], kept.get("head_bias"), finish=finish_of(run.model))

    def loss_terms(self, forward: Forward) -> dict[str, Tensor]:
        """What makes (1 - kd) (L_QA + lambda L_LM) + kd KL of L_QA."""
        lm = self.lm_weight * self.language_modelling(forward)
        if self._heads is None:
            return {"lm": lm}
        asked = forward.token_mean(forward.token_loss_BS * forward.label_mask())
        return {
            "lm": (1 - self.distill) * lm,
            "less": -self.distill * asked,
            "distill": self.distill * self._divergence(forward, *self._heads),
        }

    def _divergence(self, forward: Forward, head: Logits, head_before: Logits) -> Tensor:
        """KL from the model's earlier predictions, mean over the answer tokens of a micro-batch's samples."""
        mine = forward.sources.index(self.name)
        places = [place - self._first for source, place, _ in forward.drawn if source == mine]
        before = [self._before[i] for i in places if 0 <= i < len(self._before)]
        if not sum(map(len, before)):
            return forward.token_loss_BS.new_zeros(())
        of_samples = (forward.row_BS >= self._first) & (forward.row_BS < self._first + len(self._before))
        wanted = (forward.label_mask() & (of_samples & (forward.offset_BS > 0))[:, 1:]).flatten()
        where = torch.nonzero_static(wanted, size=sum(map(len, before))).squeeze(1)
        hidden_TD = forward.taps["last_hidden_state"][:, :-1].flatten(0, 1).index_select(0, where)
        before_TD = torch.cat(before).to(hidden_TD.device, hidden_TD.dtype, non_blocking=True)
        return logit_divergence(hidden_TD, before_TD, head, head_before, temperature=1.0)


def predicting(labels: list[int]) -> list[int]:
    """Positions whose hidden states predict the trained tokens of a row; its first token has none that all models share."""
    return [i - 1 for i, label in enumerate(labels) if i and label != -100]
