r"""STM, selective token masking: tokens that surprise the base model do not train.

Wu et al., "Mitigating Forgetting in LLM Fine-Tuning via Low-Perplexity Token Learning", NeurIPS 2025,
https://arxiv.org/abs/2501.14315.

The tokens of a new task's rows that the base model finds unlikely pull its weights furthest from where they are. Before
training the base reads the rows once, and a token whose perplexity under it, given the tokens before, is above a threshold
gets no loss:

    ppl_t = exp(-log p_base(x_t | x_<t)),        label_t <- -100 where ppl_t > threshold

The tokens stay in the row, so later ones are still predicted from them, and the loss is the mean over the tokens that are
left. 2.5, the default here and in the published code, masks what the base gives a probability below 0.4.

The paper's second variant, which compares with a model fine-tuned on the task first, is not built.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from datasets import Dataset

from hf_continual.bounds import number, one_of, plain_name
from hf_continual.data.flat_rows import IGNORED, flat_rows, with_labels
from hf_continual.methods.base import Method, Run, State
from hf_continual.methods.base_pass import (
    CACHE,
    BaseValues,
    all_values,
    check_same_base,
    negative_log_likelihood,
    record_base,
)
from hf_continual.paper import Paper

__all__ = ["MaskSurprising", "masked_labels"]

logger = logging.getLogger(__name__)


def masked_labels(labels_T: np.ndarray, predicted_T: np.ndarray, nll_N: np.ndarray, threshold: float) -> np.ndarray:
    """Labels without those of surprising tokens.

    Args:
        labels_T: Labels, -100 where a token is not trained.
        predicted_T: Whether a token has a label and is predicted; bool.
        nll_N: -log p_base of the N predicted tokens, in order, in nats.
        threshold: Highest perplexity, exp of these, at which a token still trains.

    Returns:
        New labels; a token exactly at the threshold keeps its own.
    """
    masked_T = labels_T.copy()
    where = np.flatnonzero(predicted_T)
    masked_T[where[nll_N > math.log(threshold)]] = IGNORED
    return masked_T


@dataclass
class MaskSurprising(Method):
    """Do not train on the tokens that the base model finds surprising.

    Idea: what the model is unlikely to say itself changes it most, and teaches a task least.
    Hooks: before training, rows. Cost: one forward pass over the task's rows before the first step (none if an earlier run made
    it), 4 bytes per trained token on disk and about 30 in memory while labels are masked; a step costs nothing more.
    Relations: `EntropyWeighted` lowers the loss of tokens that the model is sure about instead; rows that the model wrote
    itself (`own_words`) surprise it least. Only labels change, so packing, padding-free batches, accumulation, several
    processes and every loss of TRL see an ordinary dataset. Composes with everything. Replayed rows, and samples that other methods add, are not masked.
    Not for tasks that are all new to the model: what it has never seen is what is masked.

    The base is the model with its adapters off. Where all weights are trained it is the model that the task starts from, which
    in a later task has learned the earlier ones.

    Args:
        threshold: Highest perplexity of a token that trains, at least 1; infinity (``.inf`` in YAML) masks none.
        reference: Model that is asked: ``"base"``, or the model at ``"task_start"``, with the adapter as it is then.
        cache_dir: Folder of the recorded values; runs with the same rows and base share them.
        name: Prefix of the logged values.

    Raises:
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If one is out of range, or no token is left to train.
    """

    threshold: float = 2.5
    reference: Literal["base", "task_start"] = "base"
    cache_dir: str = CACHE
    name: str = "mask_surprising"  # pyrefly: ignore[bad-override]

    places: ClassVar[tuple[str, ...]] = ("cache_dir",)
    state_with_model: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Mitigating Forgetting in LLM Fine-Tuning via Low-Perplexity Token Learning",
        "Wu et al.",
        2025,
        arxiv="2501.14315",
        venue="NeurIPS 2025",
    )
    _base: BaseValues | None = field(default=None, init=False, repr=False, compare=False)
    _own: int | None = field(default=None, init=False, repr=False, compare=False)
    _counts: tuple[int, int] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        number("MaskSurprising", "threshold", self.threshold)
        if not self.threshold >= 1:
            raise ValueError(
                f"MaskSurprising(threshold={self.threshold!r}) must be at least 1: it is a perplexity, and that of a token the "
                f"base is certain of is 1. The paper uses 2.5; infinity masks no token."
            )
        one_of("MaskSurprising", "reference", self.reference, ("base", "task_start"))
        plain_name("MaskSurprising", self.name)

    def reads_reference(self) -> bool:
        """The weights before training read the rows."""
        return self.threshold != math.inf

    def previews(self) -> bool:
        """The fraction that is masked depends on the model."""
        return self.reads_reference()

    def preview(self, run: Run, folder: str) -> str:
        """The fraction of the tokens of a few rows that is masked."""
        flat = flat_rows(run.task_rows, "MaskSurprising")
        base = record_base(run, flat, negative_log_likelihood, "MaskSurprising", self.reference, folder)
        nll_N = all_values(base)
        masked = int((nll_N > math.log(self.threshold)).sum())
        later = " (measured on the model that the plan starts from)" if run.task.index else ""
        return (
            f"{self.name} masks {100 * masked / len(nll_N):.0f} % of the tokens, {masked:,} of {len(nll_N):,} in the first "
            f"{len(flat.rows) - 1} rows{later}"
        )

    def prepare(self, run: Run) -> None:
        """Count the task's own rows: those that other methods add after them, such as samples, are not masked."""
        if self.reads_reference() and self._own is None:
            self._own = len(run.task_rows)

    def edit_rows(self, run: Run, rows: Dataset) -> Dataset:
        """Record the base's perplexities, unless that was done, and mask the labels above the threshold."""
        if self.threshold == math.inf:
            return rows
        whole = flat_rows(rows, "MaskSurprising")
        flat = whole.first(min(self._own or len(rows), len(rows)))
        if self._base is None:  # in a second call of train the weights have moved since
            self._base = record_base(
                run, flat, negative_log_likelihood, "MaskSurprising", self.reference, self.cache_dir
            )
        nll_N = all_values(self._base)
        predicted_T = flat.predicted_T
        labels_T = masked_labels(flat.labels_T, predicted_T, nll_N, self.threshold)
        left = int((labels_T[predicted_T] != IGNORED).sum())
        self._counts = (len(nll_N) - left, len(nll_N))
        self._report(flat.rows, labels_T, nll_N)
        return with_labels(rows, whole, np.concatenate([labels_T, whole.labels_T[len(labels_T) :]]))

    def _report(self, rows: np.ndarray, labels_T: np.ndarray, nll_N: np.ndarray) -> None:
        """Say how many tokens are masked; refuse to train on none."""
        assert self._counts is not None
        masked, total = self._counts
        if masked == total:
            raise ValueError(
                f"MaskSurprising(threshold={self.threshold:g}) masks all {total:,} tokens of the task: the lowest perplexity is "
                f"{math.exp(float(nll_N.min())):.3g}, and nothing is left to learn. Raise the threshold; the median is "
                f"{math.exp(float(np.median(nll_N))):.3g}."
            )
        empty = int((np.add.reduceat(labels_T != IGNORED, rows[:-1]) == 0).sum())
        logger.info(
            "MaskSurprising: %s of %s tokens (%.1f %%) have a perplexity above %g and are not trained; %d of %d rows have none "
            "left.", f"{masked:,}", f"{total:,}", 100 * masked / total, self.threshold, empty, len(rows) - 1,
        )  # fmt: skip

    def begin_task(self, run: Run) -> None:
        """Log the fraction of the tokens that is masked, once."""
        if self._counts is not None and run.step == 0:
            run.note(f"{self.name}/masked", float(self._counts[0]), float(self._counts[1]))

    def state_dict(self, run: Run) -> State:
        """Fingerprint of the base that was asked."""
        return {} if self._base is None else {"weights": self._base.weights}

    def load_state_dict(self, state: State, run: Run) -> None:
        """Refuse to resume with what another base says."""
        check_same_base("MaskSurprising", self._base, state.get("weights"))
