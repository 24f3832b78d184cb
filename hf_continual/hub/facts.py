"""The facts of a card: plain data, no model, no network. `None` means unknown, and unknown facts are not printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from hf_continual.hub.refs import UNKNOWN, ModelRef
from hf_continual.metrics import AccuracyMatrix, Cell, mean
from hf_continual.paper import Paper
from hf_continual.plain import as_plain

Relation = Literal["adapter", "finetune", "merge"]

# Files of a pushed folder: all settings, and all measurements.
CONFIG, RESULTS = "continual_config.json", "continual_results.json"


@dataclass(frozen=True)
class TaskFacts:
    """One task of the sequence.

    Args:
        name: Name.
        dataset: Hub id of its rows, or None.
        dataset_config: Name of the dataset's configuration.
        dataset_split: Split that was learned.
        dataset_revision: Commit of the dataset.
        train_rows: Number of rows that were learned.
        started_from: Model that training started from.
        checkpoint: Where the model of this stage is published; None for the last, which is this model.
    """

    name: str
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_split: str | None = None
    dataset_revision: str | None = None
    train_rows: int | None = None
    started_from: ModelRef | None = None
    checkpoint: ModelRef | None = None


@dataclass(frozen=True)
class MethodFacts:
    """A method against forgetting.

    Args:
        name: Its short name.
        options: Its hyper-parameters, plain data.
        paper: The paper it cites.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    paper: Paper | None = None


@dataclass(frozen=True)
class LearnedFacts:
    """State that a method left with the model for the next task.

    Args:
        name: The method's short name.
        kind: Its name in the table of methods, or ``"package.module:Class"``.
        what: Description of the state.
        tensors: Number of tensors.
        size: Bytes.
    """

    name: str
    kind: str
    what: str
    tensors: int
    size: int


@dataclass(frozen=True)
class GaugeFacts:
    """A general ability outside the tasks, before and after.

    Args:
        name: Benchmark.
        base: Value of the base model.
        value: Value of this model.
        lower_is_better: Whether it is a loss.
        protocol: How it was measured.
        n: Number of rows or tokens.
        status: MEASURED, NOT_RUN or ERROR.
        error: What went wrong.
    """

    name: str
    base: float | None = None
    value: float | None = None
    lower_is_better: bool = False
    protocol: str = ""
    n: int | None = None
    status: str = "MEASURED"
    error: str | None = None

    @property
    def worse(self) -> bool:
        """Whether this model is worse than the base."""
        if self.status != "MEASURED" or self.base is None or self.value is None:
            return False
        return self.value > self.base if self.lower_is_better else self.value < self.base


@dataclass(frozen=True)
class Evaluation:
    """All measurements. Every figure of a card is computed from them.

    Args:
        tasks: Names of the tasks, in order.
        matrix: Row i holds the scores after task i; None if it was not measured.
        base_row: Scores of the base model, or None.
        metric: How the tasks were scored.
        lower_is_better: Whether the scores are losses.
        rows: Number of scored rows by task.
        status: Status by ``(moment, task)`` if it is not MEASURED, as ``{"moment/task": "ERROR"}``.
        gauges: General abilities outside the tasks.
        intervals: 95 % intervals by figure: op, bwt, fwt, forgetting.
        row_names: Names of the rows, if they are not "after TASK": a merge and joint training have one row.
        best_plain: The paired test against the best plain run of the sweep that it belongs to, as plain data; None without.
    """

    tasks: tuple[str, ...] = ()
    matrix: tuple[tuple[Cell, ...], ...] = ()
    base_row: tuple[Cell, ...] | None = None
    metric: str | None = None
    lower_is_better: bool = False
    rows: Mapping[str, int] = field(default_factory=dict)
    status: Mapping[str, str] = field(default_factory=dict)
    gauges: tuple[GaugeFacts, ...] = ()
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    row_names: tuple[str, ...] | None = None
    best_plain: Mapping[str, Any] | None = None

    @property
    def accuracy(self) -> AccuracyMatrix:
        """The matrix, with its figures."""
        width = len(self.tasks)
        rows = [[*row, *[None] * (width - len(row))] for row in self.matrix]
        return AccuracyMatrix(rows, None if self.base_row is None else list(self.base_row), self.lower_is_better)

    @property
    def figures(self) -> dict[str, Cell]:
        """OP, BWT, FWT and forgetting; None if cells are missing, or if a task has no row."""
        names = ("op", "bwt", "fwt", "forgetting")
        if not self.matrix or (self.row_names is not None and len(self.matrix) < len(self.tasks)):
            return {**dict.fromkeys(names), "op": mean(self.matrix[-1]) if self.matrix else None}
        m = self.accuracy
        return dict(
            zip(names, (m.overall_performance, m.backward_transfer, m.forward_transfer, m.forgetting), strict=True)
        )


@dataclass(frozen=True)
class MergeFacts:
    """How a merge was made.

    Args:
        method: Its name, such as ``"recall"``.
        inputs: The merged models, oldest first.
        options: The options of the call.
        paper: The paper it cites.
        weights: Weights of the inputs by layer group, in the order of `inputs`.
        image: Plot of the weights in the folder, such as ``"plots/merge_weights.png"``.
        report: File in the folder with the full report.
        call: Python call that repeats the merge.
        notes: Notes for the reader.
    """

    method: str
    inputs: tuple[ModelRef, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    paper: Paper | None = None
    weights: Mapping[str, Sequence[float]] | None = None
    image: str | None = None
    report: str | None = None
    call: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CardFacts:
    """All facts of a card.

    Args:
        name: Name of the model, for the title if there is no `repo_id`.
        repo_id: Where it is published, or None.
        kind: ``"adapter"`` or ``"model"``.
        base: The root of the lineage: the original base model.
        parent: The model that this one was trained from; by default the base.
        tasks: The tasks in order.
        methods: Methods of the last stage.
        learned: State that methods left in the folder for the next task.
        method_state: ``"left out"`` if that state is not pushed.
        merge: How it was merged, if it was.
        training: ``"joint"`` if all tasks were learned in one run, None if one after another.
        evaluation: The measurements.
        settings: Training arguments that are not the defaults.
        adapter: Facts of the adapter: rank, alpha, modules.
        seed: Seed of training.
        steps: Optimizer steps of the last stage.
        seconds: Wall time of the last stage; None if it was interrupted and resumed, since no process saw all of it.
        tokens: Tokens that it trained on, over all processes; None likewise.
        memory_bytes: Peak memory that its process 0 allocated on its device; None on a CPU.
        ended: What rules on gauges did: why the last stage ended early, which weights were kept.
        hardware: Hardware of the run.
        license: Licence of this model; None if unknown.
        license_name: Its name, if the licence is ``other``.
        license_link: Its link, if the licence is ``other``.
        license_reason: Where the licence comes from, in words.
        languages: ISO 639 codes.
        tags: Tags that the underlying trainer gives its models.
        tracking: Pages of the training run, by the tracker's name.
        chat: Whether the tokenizer has a chat template.
        plots: Plots in the folder by what they show: ``forgetting``, ``matrix``.
        versions: Versions by package.
    """

    name: str
    repo_id: str | None = None
    kind: Literal["adapter", "model"] = "model"
    base: ModelRef = UNKNOWN
    parent: ModelRef | None = None
    tasks: tuple[TaskFacts, ...] = ()
    methods: tuple[MethodFacts, ...] = ()
    learned: tuple[LearnedFacts, ...] = ()
    method_state: Literal["left out"] | None = None
    merge: MergeFacts | None = None
    training: Literal["joint"] | None = None
    evaluation: Evaluation = Evaluation()
    settings: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    steps: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    memory_bytes: int | None = None
    ended: tuple[str, ...] = ()
    hardware: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    license_reason: str | None = None
    languages: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    tracking: Mapping[str, str] = field(default_factory=dict)
    chat: bool = False
    plots: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def relation(self) -> Relation:
        """Its relation to its base on the Hub."""
        if self.kind == "adapter":
            return "adapter"
        return "merge" if self.merge is not None else "finetune"

    @property
    def base_models(self) -> list[str]:
        """Hub ids for ``base_model``: the adapter's base; or the parent; or the root and every published input."""
        if self.relation == "merge":
            assert self.merge is not None
            found = [self.base, *self.merge.inputs]
        elif self.relation == "adapter":
            found = [self.base]
        else:
            found = [self.parent if self.parent is not None and self.parent.hub_id else self.base]
        return list(dict.fromkeys(ref.hub_id for ref in found if ref.hub_id))

    @property
    def parents(self) -> list[ModelRef]:
        """The models whose licences this one must satisfy."""
        if self.merge is not None:
            return [self.base, *self.merge.inputs] if self.base.hub_id or self.base.name else [*self.merge.inputs]
        return [self.base] if self.parent is None or self.parent == self.base else [self.base, self.parent]

    @property
    def papers(self) -> list[Paper]:
        """The papers to cite, each once."""
        found = [m.paper for m in self.methods] + ([self.merge.paper] if self.merge else [])
        return list(dict.fromkeys(p for p in found if p is not None))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``continual_config.json``: without facts that are in other files, and without empty fields."""
        said = ("evaluation", "learned")
        return {
            k: v
            for k, v in as_plain(asdict(self), other=lambda value: value).items()
            if k not in said and v not in (None, {}, [])
        }
