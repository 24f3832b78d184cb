r"""Experience replay: rows of old tasks, or general text, mixed into training.

Rolnick et al., "Experience Replay for Continual Learning", NeurIPS 2019, https://arxiv.org/abs/1811.11682.

A network that sees only the new task fits only the new task. Mixing a small fraction of old rows into
every batch keeps their loss in the sum that is minimised; it is the simplest remedy and the
baseline that every other one is measured against. With N_t task tokens, N_r replayed tokens and
the weight w of a replayed token, the loss of a step is the weighted token mean

    L = (sum_task l_i + w * sum_replay l_j) / (N_t + w * N_r).

w = 1 is plain mixing, w = 0 is plain fine-tuning. ``ratio`` is N_r / (N_t + N_r) over the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset

from hf_continual.bounds import at_least, between, plain_name, whole_number
from hf_continual.data.replay import ReplayRows, RowType
from hf_continual.data.row_values import TEXTUAL
from hf_continual.data.rows import load_rows
from hf_continual.methods.base import AddedRows, Method, Run
from hf_continual.paper import Paper

RATIO = "It is the fraction of the mix's tokens that are replayed: 0.1 means one token in ten. To train without replay, drop the method."


@dataclass
class Replay(Method):
    """Mix rows of old tasks or general text into training.

    Idea: the loss on earlier data stays part of the objective.
    Hooks: rows. Rows are added to the task's micro-batches, so a step costs proportionally more.
    Relations: `GeRe` adds a constraint on hidden states to general rows. Composes with everything.
    Differs from common implementations: the ratio is counted in tokens and holds under packing,
    accumulation and several processes, and a resumed run draws the same rows as an uninterrupted one.

    Args:
        rows: Rows of the task's type (prompt and completion, text, messages), or tokenised rows with
            ``input_ids`` and ``labels`` or a ``completion_mask``: a dataset, a list of dictionaries, a file or a Hub id.
        ratio: Fraction of the tokens of the final mix that are replayed, strictly between 0 and 1. A few
            per cent of old rows already keep most of a task; 0.05 to 0.3 is common.
        per_batch: Instead of `ratio`: rows added to each micro-batch of each process.
        weight: Weight of a replayed token in the loss, 0 or more; 1 treats all tokens alike.
        row_type: ``"same"`` refuses rows of another type than the task's. To mix types on purpose, declare
            their type: ``"text"``, ``"prompt_completion"``, ``"messages"``, ``"tokenized"``.
            Text trains on every token, prompt and completion on the completion only.
        name: Prefix of the logged values; needed when a run replays from two sources.

    Raises:
        FileNotFoundError: If `rows` is a path that does not exist.
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If not exactly one of `ratio` and `per_batch` is given, or one is out of range, or
            there are no rows.
    """

    rows: Dataset | str | list[dict[str, Any]]
    ratio: float | None = None
    per_batch: int | None = None
    weight: float = 1.0
    row_type: RowType = "same"
    name: str = "replay"  # pyrefly: ignore[bad-override]

    places: ClassVar[tuple[str, ...]] = ("rows",)
    paper: ClassVar[Paper] = Paper(
        "Experience Replay for Continual Learning",
        "Rolnick and Ahuja and Schwarz and Lillicrap and Wayne",
        2019,
        arxiv="1811.11682",
        venue="NeurIPS 2019",
    )

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.per_batch is None):
            raise ValueError(
                f"Replay needs either ratio (fraction of tokens) or per_batch (rows per micro-batch), got "
                f"ratio={self.ratio!r} and per_batch={self.per_batch!r}."
            )
        if self.ratio is not None:
            between("Replay", "ratio", self.ratio, 0, 1, note=RATIO)
        if self.per_batch is not None:
            whole_number("Replay", "per_batch", self.per_batch, unit="rows per micro-batch")
        at_least("Replay", "weight", self.weight, 0)
        plain_name("Replay", self.name)
        # Read now: a wrong path must fail before a model is loaded, not after.
        self._rows = load_rows(self.rows, checked=TEXTUAL)

    def added_rows(self) -> AddedRows:
        """The ratio or number of rows, and their weight."""
        return AddedRows(self.ratio, self.per_batch, float(self.weight))

    def replay(self, run: Run) -> ReplayRows:
        """The rows, with their ratio and weight."""
        return ReplayRows(self._rows, self.ratio, self.per_batch, float(self.weight), self.row_type)
