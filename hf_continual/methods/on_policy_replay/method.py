r"""On-policy replay (OPR): the model answers old prompts itself, and later tasks replay its own answers.

Chen et al., "On-Policy Replay for Continual Supervised Fine-Tuning", 2026, https://arxiv.org/abs/2605.29495.

When a task ends, its model answers a sample of the task's prompts. The best answers are kept, and later tasks replay them
in place of the rows that the task was trained on:

    A = {(x, y) : x drawn from the task's prompts, y ~ p(. | x)},   |A| = candidates * K,   K = share * rows
    buffer <- buffer + the K best of A          by  1/|y| sum_t log p(y_t | x, y_<t)   or by a score against the row's answer

which the paper calls OPR-SC and OPR-RU. The answers are likely under the model that wrote them, so replaying them moves the
weights less than replaying the rows' own answers.

Differs from the published code: only the prompts of the task that ends are answered, once, and not those of all tasks
again by each model, which needs all old rows and K grows with the tasks; prompts are drawn without replacement and
not all answered (``candidates`` of 1 / share is that); answers without an end are left out; log-probabilities are at temperature 1
whatever the answers are drawn with; ``ratio`` is a fraction of the tokens, as in `Replay`, in place of one list of rows.

Cost: ``candidates * share`` of the task's rows are answered when a task ends, in batches; nothing per step but the replayed
rows. Memory: the kept rows, 8 bytes per token, in main memory and on disk; while answers are written, the cache of
`batch_rows` answers and one float32 logit per row and word of the vocabulary.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset

from hf_continual.bounds import at_least, between, number, plain_name, whole_number
from hf_continual.data.answered_rows import Asked, Row, asked_of, packed_rows, unpacked_rows
from hf_continual.data.replay import ReplayRows
from hf_continual.data.sample_format import documents
from hf_continual.data.sampling import Answer, Sampling
from hf_continual.ends import added_tokens, end_tokens
from hf_continual.evaluation.match import find_match
from hf_continual.methods.base import AddedRows, Method, Run, State
from hf_continual.methods.on_policy_replay.answers import Counts, choose, write_answers
from hf_continual.methods.unfinished import Unfinished
from hf_continual.paper import Paper
from hf_continual.tensors.reference import most_tokens

logger = logging.getLogger(__name__)

LIKELY = "log_probability"
DRAWS = 11  # tells the draw of prompts from other draws with the run's seed


@dataclass
class OnPolicyReplay(Method):
    """Replay the model's own, filtered answers to the prompts of earlier tasks.

    Idea: what a model says itself it also says after a small step, so replaying it costs the new task little.
    Hooks: rows, task end. Cost: see the module; in training that of `Replay` with the same ratio.
    Relations: `Replay` replays the rows' own answers; `LAMOL` lets the model write prompts too and keeps no row. Composes with
    everything. Reads whole weights when the task ends: FSDP and ZeRO-3 are refused.

    Args:
        share: Fraction of the task's rows to keep answers for, from 0 to 1; the paper reports 0.01 and 0.1. 0: none.
        ratio: Fraction of the tokens of the mix that are replayed, from 0 to below 1. 0: none.
        candidates: Answers written for each one kept, at least 1: 2 keeps the better half.
        select: What is best: ``"log_probability"``, or a rule of `hf_continual.evaluation.match` that compares the answer with
            the row's own, such as ``"stripped"``, ``"rougeL"`` or your ``"package.module:function"``.
        threshold: Answers below it are rejected: a mean log-probability in nats per token, such as -1.0, or a score. None: any
            log-probability, or a score above 0.
        temperature: Of the draws, 0.1 as published; 0 takes the likeliest token at each place.
        top_k: Number of likeliest tokens to draw from; 0: all.
        max_new_tokens: Maximum number of tokens of an answer; None: of the longest own answer among the drawn rows.
        batch_rows: Prompts answered at once on each process. Other numbers draw other answers.
        name: Prefix of the logged values, name of the replay source, and of the files handed to the next task.

    Raises:
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If one is out of range, or what an earlier task left does not fit.
    """

    share: float = 0.1
    ratio: float = 0.1
    candidates: float = 2.0
    select: str = LIKELY
    threshold: float | None = None
    temperature: float = 0.1
    top_k: int = 0
    max_new_tokens: int | None = None
    batch_rows: int = 32
    name: str = "on_policy_replay"  # pyrefly: ignore[bad-override]

    leaves: ClassVar[str] = "prompts of the tasks so far with the model's own answers"
    keeps_rows: ClassVar[bool] = True
    droppable: ClassVar[bool] = True
    outlives_merging: ClassVar[bool] = True  # they are rows
    paper: ClassVar[Paper] = Paper(
        "On-Policy Replay for Continual Supervised Fine-Tuning", "Chen et al.", 2026, arxiv="2605.29495"
    )
    _past: list[Row] = field(default_factory=list, init=False, repr=False, compare=False)
    _reports: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False, compare=False)
    _new: tuple[list[Row], list[dict[str, Any]]] = field(default=([], []), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        title = "OnPolicyReplay"
        between(title, "share", self.share, 0, 1, closed="[]")
        between(title, "ratio", self.ratio, 0, 1, closed="[")
        at_least(title, "candidates", self.candidates, 1)
        at_least(title, "temperature", self.temperature, 0)
        if self.threshold is not None:
            number(title, "threshold", self.threshold)
        for key, least in (("top_k", 0), ("batch_rows", 1)):
            whole_number(title, key, getattr(self, key), least)
        if self.max_new_tokens is not None:
            whole_number(title, "max_new_tokens", self.max_new_tokens, unit="tokens")
        plain_name(title, self.name)
        if self.select != LIKELY:
            try:
                find_match(self.select)
            except ValueError as error:
                raise ValueError(f"OnPolicyReplay(select={self.select!r}): {error} Or give {LIKELY!r}.") from None

    @classmethod
    def row_sources(cls) -> tuple[str, ...]:
        """None: it writes its rows itself."""
        return ()

    def reads_reference(self) -> bool:
        """To write answers, when the task ends."""
        return self.share != 0

    def makes_rows(self) -> bool:
        """They come with the state that the previous task left."""
        return self.ratio != 0

    def added_rows(self) -> AddedRows | None:
        """The ratio of the kept answers."""
        return AddedRows(self.ratio) if self.ratio else None

    def load_task_state(self, state: State, run: Run) -> None:
        """Load the kept answers of earlier tasks."""
        words = len(run.tokenizer)  # pyrefly: ignore[bad-argument-type]
        if state["vocabulary"] != words:
            raise ValueError(
                f"OnPolicyReplay: the kept answers are tokens of a tokenizer with {state['vocabulary']:,} words, and this run's has "
                f"{words:,}. Give the same tokenizer, or start without them: ContinualConfig(fresh_methods=True)."
            )
        self._past, self._reports = unpacked_rows(state), list(state["reports"])

    def replay(self, run: Run) -> ReplayRows | None:
        """The kept answers with their prompts, once they are loaded."""
        if self.share:
            _ = run.task_rows  # a stream cannot be asked: refuse it before training, not when the task ends
        if not self._past or not self.ratio:
            return None
        return ReplayRows(Dataset.from_list(self._past), self.ratio, row_type="tokenized")

    def begin_task(self, run: Run) -> None:
        """Log what the last task left, once; warn if a later task has nothing to replay."""
        if self._reports and run.step == 0:
            last = Counts(**{k: v for k, v in self._reports[-1].items() if k != "task"})
            for key in ("asked", "kept", "rejected", "outranked", "log_probability"):
                if (value := getattr(last, key)) is not None:
                    run.note(f"{self.name}/{key}", float(value))
        if self.ratio and not self._past and run.task.index and not run.starts_afresh:
            logger.warning(
                "OnPolicyReplay: no earlier task left answers, so nothing is replayed in task %d. Give the method to the earlier "
                "tasks too.", run.task.index + 1,
            )  # fmt: skip

    def end_task(self, run: Run) -> None:
        """Answer prompts of the task, and keep the best answers."""
        if not self.share:
            return
        ends, counts = self._ends(run), Counts()
        asked = self._draw(run, ends, counts)
        most = self.max_new_tokens or max((len(a.answer) for a in asked), default=1)
        how = Sampling(most, self.top_k, temperature=self.temperature)
        unfinished = Unfinished(run, self.name, {"what": "answers", **self.describe()})
        found = write_answers(run, asked, how, self.batch_rows, ends, unfinished)
        chosen = choose(
            asked, found, ends, lambda question, answer: self._score(run, question, answer, ends),
            math.ceil(self.share * counts.rows), counts,
        )  # fmt: skip
        self._new = [asked[i].row(found[i].tokens) for i in chosen], [{"task": run.task.name, **asdict(counts)}]
        unfinished.clear()
        self._report(run, counts)

    def _ends(self, run: Run) -> frozenset[int]:
        """Tokens that end an answer: the model's, and the special token that ends the first row, such as that of a turn."""
        first: Any = run.task_rows[0]
        last = next((label for label in reversed(first["labels"]) if label != -100), None)
        ends = end_tokens(run.model, run.tokenizer)
        return ends | {last} if last in added_tokens(run.tokenizer).special else ends

    def _draw(self, run: Run, ends: frozenset[int], counts: Counts) -> list[Asked]:
        """The prompts to answer: drawn with the run's seed, without replacement, shortest first."""
        rows: Any = run.task_rows
        packs = rows["seq_lengths"] if "seq_lengths" in rows.column_names else None
        counts.rows = len(rows) if packs is None else sum(map(len, packs))
        wanted = min(math.ceil(math.ceil(self.share * counts.rows) * self.candidates), counts.rows)
        order = np.random.default_rng([run.seed, run.task.index, DRAWS]).permutation(counts.rows)[:wanted]
        chosen = set(order.tolist())
        found = [asked_of(*row, ends) for place, row in enumerate(documents(rows)) if place in chosen]
        limits = [n for n in (run.max_length, most_tokens(run.model)) if n is not None]
        room = min(limits, default=math.inf)
        able = [a for a in found if a is not None and len(a.prompt) + len(a.tail) < room]
        counts.asked, counts.unusable = len(able), len(found) - len(able)
        return sorted(able, key=lambda a: len(a.prompt))

    def _score(self, run: Run, asked: Asked, answer: Answer, ends: frozenset[int]) -> float | None:
        """The score of an answer; None if it is below the threshold."""
        if self.select == LIKELY:
            score = answer.log_probability
        else:
            hidden = added_tokens(run.tokenizer).special | ends
            said, own = (
                str(run.tokenizer.decode([t for t in tokens if t not in hidden]))
                for tokens in (answer.tokens, asked.answer)
            )
            score = float(find_match(self.select)(said, own))
        if self.threshold is None:
            return score if self.select == LIKELY or score > 0 else None
        return score if score >= self.threshold else None

    def _report(self, run: Run, counts: Counts) -> None:
        logger.info(
            "OnPolicyReplay: of %d rows, %d prompts were answered. Kept: %d answers, %d of them the row's own. Rejected: %d (%d "
            "without an end, %d empty, %d below the threshold); %d were outranked.",
            counts.rows, counts.asked, counts.kept, counts.same, counts.rejected, counts.unfinished, counts.empty, counts.below,
            counts.outranked,
        )  # fmt: skip
        if not counts.kept:
            logger.warning(
                "OnPolicyReplay: no answer to %d prompts can be kept, so later tasks replay none of this one. Train longer, raise "
                "share, candidates or max_new_tokens, or lower threshold.", counts.asked,
            )  # fmt: skip

    def task_state(self, run: Run) -> State:
        """The kept answers of all tasks so far with their prompts, as tokens, and the counts."""
        rows, reports = [*self._past, *self._new[0]], [*self._reports, *self._new[1]]
        if not rows and not reports:
            return {}
        return {**packed_rows(rows), "vocabulary": len(run.tokenizer), "reports": reports}  # pyrefly: ignore[bad-argument-type]
