r"""LAMOL: the model learns to write samples of its tasks, and rehearses with what it writes.

Sun et al., "LAMOL: LAnguage MOdeling for Lifelong Language Learning", ICLR 2020, https://arxiv.org/abs/1909.03329.

Every row is trained in two formats in one micro-batch: as a question to be answered, and as a text to be written. With the
means over the tokens of each (section 3.1),

    L = L_QA + lambda L_LM,        lambda = lm_weight

Before a later task of N rows the model writes gamma N samples, evenly over the earlier tasks, by top-k sampling from the
marker that begins a text (section 3.2). Those with exactly one marker between question and answer join the task's rows.

Differs from the published code: the markers are texts of the tokenizer's own tokens, in the text format only, so that no
embedding grows, LoRA suffices, and questions are asked as without the method. A sample must also have an end. Both formats
share one forward pass. The marker before the answer is not weighed five times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_continual.methods.base import Forward
from hf_continual.methods.pseudo_rehearsal import PseudoRehearsal
from hf_continual.paper import Paper


@dataclass
class LAMOL(PseudoRehearsal):
    """Rehearse earlier tasks with samples that the model writes itself.

    Idea: a language model that learned its tasks as texts can write them again; no row of an earlier task is kept.
    Hooks: rows, loss terms, task end. Cost: a micro-batch has two rows for each row of the task (about twice the time and
    activations of a step), gamma more rows from the second task on, and gamma N samples to write before it.
    Relations: `Replay` mixes in rows that were kept; `LFPT5` adds a soft prompt and distillation. Composes with everything.
    Needs rows with one question and one answer each, or without a question (text). Under FSDP2 and ZeRO-1/2 samples are
    written where the model was loaded, before its weights are sharded; ZeRO-3 is refused.

    Args:
        gamma: Samples to write, as a fraction of the task's rows; the paper uses 0.05 and 0.2. 0: none.
        lm_weight: lambda, weight of the text format; the paper uses 0.25. 0: rows are trained as without the method.
        top_k: Number of likeliest tokens to draw from, 20 in the paper; 0: all.
        repetition_penalty: Above 1, tokens that were written are less likely to be written again.
        tries: Maximum number of times that missing well-formed samples are written; 1 as published.
        max_new_tokens: Maximum number of tokens of a sample; None: of the longest row of the earlier tasks.
        batch_rows: Samples written at once on each process. Other numbers draw other samples.
        gen_marker: Text that begins a sample. No row may hold its tokens.
        answer_marker: Text between question and answer.
        task_markers: Whether the name of the task is part of the first marker (the paper's task-specific tokens).
        count_invented: Whether hashes of the rows (16 bytes each) are handed over, so that questions that no earlier row
            asked can be counted. Anyone who has a row can tell from its hash that it was trained on.
        name: Prefix of the logged values, and of the files handed to the next task.

    Raises:
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If one is out of range, rows hold a marker or several answers, or what an earlier task left does not fit.
    """

    name: str = "lamol"  # pyrefly: ignore[bad-override]

    paper: ClassVar[Paper] = Paper(
        "LAMOL: LAnguage MOdeling for Lifelong Language Learning",
        "Sun et al.",
        2020,
        arxiv="1909.03329",
        venue="ICLR 2020",
    )

    def loss_terms(self, forward: Forward) -> dict[str, Tensor]:
        """lambda L_LM."""
        return {"lm": self.lm_weight * self.language_modelling(forward)}
