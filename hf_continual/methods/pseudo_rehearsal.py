"""Shared code of methods that rehearse earlier tasks with samples written by the model itself: LAMOL and LFPT5.

Before a later task the current model writes samples of the earlier ones; they join the task's rows. Each row is
trained twice in one micro-batch: as usual, and in the format in which samples are written (`data/sample_format.py`).
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor

from hf_continual.atomic_files import checksum
from hf_continual.bounds import at_least, plain_name, whole_number
from hf_continual.data.flat_rows import UNMASKED
from hf_continual.data.replay import ReplayRows
from hf_continual.data.sample_counts import Counts, Known, Survey, count, digest, merged, survey
from hf_continual.data.sample_format import SampleFormat, documents, format_of
from hf_continual.data.sampling import Sampling
from hf_continual.methods.base import AddedRows, Forward, Method, Run, State
from hf_continual.methods.pseudo_samples import write_samples
from hf_continual.methods.unfinished import Unfinished

logger = logging.getLogger(__name__)

TRIED = 8  # rows in the format of samples on which the collator is tried


@dataclass(frozen=True)
class Pairs:
    """Makes of each row its second one; samples of an earlier task keep that task's marker."""

    how: SampleFormat
    earlier: dict[int, SampleFormat]

    def __call__(self, tokens: Any, labels: Any) -> dict[str, list[int]] | None:
        """The row in the format in which samples are written."""
        how = self.earlier.get(digest(tokens), self.how) if self.earlier else self.how
        return how.written(tokens, labels)


@dataclass
class PseudoRehearsal(Method):
    """Rows and state of a method that rehearses with self-written samples; `LAMOL` documents the hyper-parameters."""

    gamma: float = 0.2
    lm_weight: float = 0.25
    top_k: int = 20
    repetition_penalty: float = 1.0
    tries: int = 1
    max_new_tokens: int | None = None
    batch_rows: int = 32
    gen_marker: str = "__gen__"
    answer_marker: str = "__ans__"
    task_markers: bool = False
    count_invented: bool = True

    leaves: ClassVar[str] = "the names of the tasks it can write samples of, and 8-byte hashes of their rows"
    droppable: ClassVar[bool] = True
    outlives_merging: ClassVar[bool] = True  # what it learned to write is in the weights
    _pairs: Pairs | None = field(default=None, init=False, repr=False, compare=False)
    _survey: Survey = field(default_factory=Survey, init=False, repr=False, compare=False)
    _past: State = field(default_factory=dict, init=False, repr=False, compare=False)
    _pseudo: list[dict[str, list[int]]] | None = field(default=None, init=False, repr=False, compare=False)
    _first: int = field(default=0, init=False, repr=False, compare=False)  # place of the first sample among the rows
    _counts: Counts | None = field(default=None, init=False, repr=False, compare=False)
    _unfinished: Unfinished | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        title = type(self).__name__
        for key, least in (("gamma", 0), ("lm_weight", 0), ("repetition_penalty", 1)):
            at_least(title, key, getattr(self, key), least)
        for key, least in (("top_k", 0), ("tries", 1), ("batch_rows", 1)):
            whole_number(title, key, getattr(self, key), least)
        if self.max_new_tokens is not None:
            whole_number(title, "max_new_tokens", self.max_new_tokens, 2, unit="tokens")
        for key in ("gen_marker", "answer_marker"):
            if not isinstance(getattr(self, key), str) or not getattr(self, key).strip():
                raise ValueError(
                    f"{title}({key}={getattr(self, key)!r}) must be a short text that no row holds, such as '__gen__'."
                )
        if self.gamma and not self.lm_weight:
            raise ValueError(
                f"{title}(gamma={self.gamma}, lm_weight=0) asks for samples from a model that is never taught to write them. "
                f"Give lm_weight above 0, or gamma=0."
            )
        plain_name(title, self.name)

    def reads_forward(self) -> bool:
        """Always: the second row of each pair has its own weight."""
        return self.lm_weight != 0

    def reads_reference(self) -> bool:
        """Always: the weights before training write the samples."""
        return self.gamma != 0

    def added_rows(self) -> AddedRows | None:
        """One row next to each of the task's."""
        return AddedRows(weight=0.0, paired=1) if self.lm_weight else None

    @classmethod
    def row_sources(cls) -> tuple[str, ...]:
        """None: it keeps no rows."""
        return ()

    def replay(self, run: Run) -> ReplayRows | None:
        """The second row of each pair; weighted by `loss_terms`, not as tokens of the mean."""
        if not self.lm_weight:
            return None
        if self._pairs is None:
            how = self._format(run, run.task.name)
            self._survey = survey(run.task_rows, how, type(self).__name__, self.count_invented)
            self._pairs = Pairs(how, {})
            if self._survey.left_out:
                logger.warning(
                    "%s: %d of %d rows have no room for the markers within %s tokens and are not learned as samples.",
                    type(self).__name__, self._survey.left_out, self._survey.rows, how.most,
                )  # fmt: skip
        shown: list[dict[str, list[int]]] = []
        for tokens, labels in documents(run.task_rows):
            if (row := self._pairs.how.written(tokens.tolist(), labels.tolist())) is not None:
                shown.append(row)
            if len(shown) == TRIED:
                break
        return ReplayRows(Dataset.from_list(shown), weight=0.0, row_type="tokenized", pair=self._pairs)

    def _format(self, run: Run, task: str) -> SampleFormat:
        marker = f"{self.gen_marker} {task}" if self.task_markers else self.gen_marker
        return format_of(
            run.task_rows, run.tokenizer, run.model, marker, self.answer_marker, run.max_length, type(self).__name__
        )

    def load_task_state(self, state: State, run: Run) -> None:
        """Load which tasks can be written, and refuse markers that they were not learned with."""
        now = self._markers(run)
        if self.lm_weight and state["markers"] != now:
            raise ValueError(
                f"{type(self).__name__}: the earlier tasks were learned with the markers {state['markers']}, but this run has "
                f"{now} (texts, their tokens, task_markers), from which the model writes nothing that it learned. Give the "
                f"same markers and tokenizer, or start without what was learned: ContinualConfig(fresh_methods=True)."
            )
        self._past = state

    def _markers(self, run: Run) -> list[Any]:
        texts = (self.gen_marker, self.answer_marker)
        ids = [run.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]  # pyrefly: ignore
        return [*texts, *ids, self.task_markers]

    def edit_rows(self, run: Run, rows: Dataset) -> Dataset:
        """Add the samples of earlier tasks to the task's rows."""
        if not self.gamma or (not self._past and self._pseudo is None):
            if self.gamma and run.task.index and not run.starts_afresh:
                logger.warning(
                    "%s: no earlier task was learned with it, so no samples are written before task %d.",
                    type(self).__name__, run.task.index + 1,
                )  # fmt: skip
            return rows
        if self._pseudo is None:  # in a second call of train the weights have moved since
            self._pseudo = self._write(run)
        if not self._pseudo:
            return rows
        self._first = len(rows)
        kept: Any = rows.select_columns(
            [c for c in ("input_ids", "labels", "seq_lengths", UNMASKED) if c in rows.column_names]
        )
        columns = {c: [row[c] for row in self._pseudo] for c in ("input_ids", "labels")}
        if UNMASKED in kept.column_names:
            columns[UNMASKED] = columns["labels"]
        if "seq_lengths" in kept.column_names:
            columns["seq_lengths"] = [[len(ids)] for ids in columns["input_ids"]]
        return concatenate_datasets([kept, Dataset.from_dict(columns, features=kept.features)])

    def _write(self, run: Run) -> list[dict[str, list[int]]]:
        """Write samples of the earlier tasks, evenly, and count the results."""
        assert self._pairs is not None
        past, tasks = self._past, list(self._past["tasks"])
        formats = [self._format(run, task) for task in tasks]
        if not self.task_markers:  # one marker, which does not say what it will write
            formats = formats[:1]
        wanted = math.ceil(self.gamma * self._survey.rows) // len(tasks) * (len(tasks) // len(formats))
        how = Sampling(self.max_new_tokens or int(past["longest"]), self.top_k, self.repetition_penalty)
        options = {"what": "samples", "tasks": tasks, **self.describe()}
        self._unfinished = Unfinished(run, self.name, options)
        kinds = bool(past["questions"]), bool(past["plain"])
        written = write_samples(
            run, self._unfinished, [(f.opening, f.ends) for f in formats], wanted, how, self.batch_rows, self.tries,
            lambda k, text: not isinstance(formats[k].read(text, *kinds), str),
        )  # fmt: skip
        read = [(f, f.read(text, *kinds)) for f, texts in zip(formats, written, strict=True) for text in texts]
        kept, self._counts = count([row for _, row in read], _known(past))
        if self.task_markers:
            self._pairs.earlier.update({digest(r["input_ids"]): f for f, r in read if not isinstance(r, str)})
        self._report(wanted * len(formats), kept)
        return kept

    def _report(self, wanted: int, kept: list[Any]) -> None:
        counts = self._counts
        assert counts is not None
        new = "" if counts.invented is None else f", {counts.invented} with a question that no earlier row asked"
        other = "" if counts.misanswered is None else f", {counts.misanswered} with another answer than the earlier row"
        logger.info(
            "%s: %d samples of earlier tasks were wanted and %d written; %d malformed (%s) are left out. Of the %d kept, "
            "%d are duplicates%s%s.",
            type(self).__name__, wanted, counts.written, counts.malformed, counts.flaws or "none", counts.kept,
            counts.duplicated, new, other,
        )  # fmt: skip
        if wanted and not kept:
            logger.warning(
                "%s: none of the %d samples has the format, so nothing is rehearsed. Train the earlier tasks longer, or raise "
                "lm_weight, tries or max_new_tokens.", type(self).__name__, counts.written,
            )  # fmt: skip

    def begin_task(self, run: Run) -> None:
        """Log the counts, once."""
        if self._counts is not None and run.step == 0:
            facts = asdict(self._counts)
            for key in ("written", "kept", "malformed", "duplicated", "invented", "misanswered"):
                if (number := facts[key]) is not None:
                    run.note(f"{self.name}/{key}", float(number))

    def language_modelling(self, forward: Forward) -> Tensor:
        """Mean loss of the second rows of a micro-batch; 0 where it has none."""
        mask = forward.label_mask(self.name)
        return (forward.token_loss_BS * mask).sum() / mask.sum().clamp(min=1)

    def end_task(self, run: Run) -> None:
        """The samples are no longer needed."""
        if self._unfinished is not None:
            self._unfinished.clear()

    def needs_earlier_task(self) -> bool:
        """The model learns to generate questions on a first task too."""
        return False

    def task_state(self, run: Run) -> State:
        """Which tasks can be written, in which format, the counts so far, and hashes of their rows."""
        if not self.lm_weight:
            return dict(self._past)
        past, now = self._past, self._survey
        report = {} if self._counts is None else {"task": run.task.name, **asdict(self._counts)}
        state: State = {
            "markers": self._markers(run),
            "tasks": [*past.get("tasks", []), run.task.name],
            "longest": max(int(past.get("longest", 0)), now.longest),
            "questions": bool(past.get("questions")) or now.questions,
            "plain": bool(past.get("plain")) or now.plain,
            "reports": [*past.get("reports", []), *([report] if report else [])],
        }
        known, earlier = now.known, _known(past)
        if self.count_invented and (not past or earlier is not None):
            questions, both = known if earlier is None else merged(earlier, known)
            state |= {"questions_known": torch.from_numpy(questions), "pairs_known": torch.from_numpy(both)}
        return state

    def state_dict(self, run: Run) -> State:
        """A fingerprint of the samples that the run was trained with."""
        return {} if self._pseudo is None else {"samples": checksum(self._pseudo)}

    def load_state_dict(self, state: State, run: Run) -> None:
        """Refuse samples that differ from those the run started with."""
        now = None if self._pseudo is None else checksum(self._pseudo)
        if state.get("samples") != now:
            raise ValueError(
                f"{type(self).__name__}: the samples of earlier tasks are not the ones that the run to resume started with. Build "
                f"the trainer with the same model as before, not with a checkpoint of it, and keep the file "
                f"continual-{self.name}.unfinished in output_dir, as another machine may draw others."
            )


def _known(past: State) -> Known | None:
    """Digests of the earlier tasks' rows; None where they were not kept."""
    if "questions_known" not in past:
        return None
    return past["questions_known"].cpu().numpy(), past["pairs_known"].cpu().numpy()
