"""The fields of a plan, their types and their defaults."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

# What `between_tasks` says for one run over all tasks, and the name of that run; what its row of the matrix is called.
JOINT, ALL_TASKS = "joint", "all tasks at once"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)


class ModelPlan(_Strict):
    """The model, and how to load it.

    Args:
        path: Folder or Hub id of a causal language model, or of an adapter to start from.
        adapter: Folder or Hub id of an adapter on `path`; a `path` that is an adapter is split into the two.
        from_adapter: What to do with the adapter: ``continue``, ``stack`` or ``merge_then_new``, see `ContinualConfig`.
        revision: Commit, branch or tag of a Hub id.
        dtype: dtype of the weights; float32 is also TRL's default.
        quantization: Options of `transformers.BitsAndBytesConfig`, such as ``{load_in_4bit: true}``.
        tokenizer: Folder or Hub id of another tokenizer.
        attn_implementation: As in transformers.
    """

    path: str
    adapter: str | None = None
    from_adapter: Literal["continue", "stack", "merge_then_new"] | None = None
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    quantization: dict[str, Any] | None = None
    tokenizer: str | None = None
    attn_implementation: str | None = None


class TaskPlan(_Strict):
    """One task: its rows, and its own settings.

    Args:
        name: Name in tables and folders.
        train: Rows to learn: a file, a saved folder, a Hub id, ``{biography: {...}}``, or rows in Python.
        test: Rows to score it with, of the same kinds: prompt and completion as text or as messages, or whole
            conversations (`messages`), with `tools` and thoughts; without them it is not scored.
        split: Split of `train`, if it has several.
        test_split: Split of `test`.
        columns: New column -> old column, or a text with old columns in braces.
        labels: Names of the classes that a column holds as numbers.
        train_rows: Maximum number of rows, drawn with `data_seed`.
        test_rows: The same for `test`.
        drop_options: Whether to remove the sentence that lists the options from the prompts.
        max_prompt_tokens: Maximum number of tokens of a prompt; longer ones are cut before their last line.
        parent: Name of the task it continues from, or ``base``; by default the one before.
        sft: Options of `trl.SFTConfig` that differ for this task.
        methods: Methods instead of the plan's.
        metric: Metric instead of `evaluation.metric`.
        evaluate: Further tasks to score after this one.
        curve: Optimizer steps at which the model is scored during training; 0 is before the first.
    """

    name: str
    train: Any
    test: Any = None
    split: str = "train"
    test_split: str = "test"
    columns: dict[str, str] | None = None
    labels: list[str] | None = None
    train_rows: int | None = Field(None, ge=1)
    test_rows: int | None = Field(None, ge=1)
    drop_options: bool = False
    max_prompt_tokens: int | None = Field(None, ge=1)
    parent: str | None = None
    sft: dict[str, Any] = {}
    methods: Any = None
    metric: Any = None
    evaluate: list[str] = []
    curve: list[int] = []


class GaugePlan(_Strict):
    """A general benchmark, measured in addition to the tasks: general text, multiple choice, the lm-eval harness.

    Args:
        rows: As `TaskPlan.train`; None for a metric with its own rows.
        split: Split of `rows`.
        columns: As in `TaskPlan`.
        limit: Maximum number of rows.
        metric: How to score them.
    """

    rows: Any = None
    split: str = "test"
    columns: dict[str, str] | None = None
    limit: int | None = Field(None, ge=1)
    metric: Any = "general_loss"


class EvaluationPlan(_Strict):
    """The evaluation after each task.

    Args:
        metric: Name of a scorer, a mapping of its name to options, or ``package.module:function``.
        tasks: ``seen`` tasks, ``all`` (including later ones), or a list of names.
        base: Whether to score the base model before the first task.
        batch_size: Rows per forward pass.
        solved_at: Refuse a task on which the base model reaches this score, as already solved; None allows all.
        gauges: General benchmarks by name.
        bootstrap: Draws of the intervals of scores that are not 0 or 1 and over seeds; 0 omits all intervals of
            figures.
    """

    metric: Any = "exact_match"
    tasks: Literal["seen", "all"] | list[str] = "seen"
    base: bool = True
    batch_size: int = Field(32, ge=1)
    solved_at: float | None = 0.9
    gauges: dict[str, GaugePlan] = {}
    bootstrap: int = Field(1000, ge=0)


class MergePlan(_Strict):
    """Merge of a task's model with the earlier ones.

    Args:
        function: A method of `hf_continual.merge` by name, ``package.module:function``, or a function, called as
            ``function(models, output_dir, **options)`` with a list of folders, oldest first. It also gets `base`,
            `task` and `calibration` (the task's training rows; for ``kif`` `calibration_new`) if it has parameters with
            these names.
        start: Each task continues from the previous ``merged`` model, and both are merged; or starts from the ``base``,
            and the models of all tasks so far are merged.
        options: Passed to the function.
    """

    function: Any
    start: Literal["merged", "base"] = "merged"
    options: dict[str, Any] = {}


class Between(_Strict):
    """The mapping form of `between_tasks`."""

    merge: MergePlan

    @field_validator("merge", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"function": value} if isinstance(value, str) or callable(value) else value


class MemoryPlan(_Strict):
    """The buffer: rows of learned tasks to keep and hand on, as ``continual/memory.jsonl`` in each task's folder.

    Args:
        policy: ``class_balanced``: a fraction of each task's rows, spread over its classes; ``newest_first``: the same
            within `capacity`, dropping the oldest tasks' rows first; ``reservoir``: a uniform sample of all rows.
        share: Fraction of each task's rows; by default 0.02.
        rows: Rows of each task, instead of `share`.
        capacity: Rows of all tasks together; not for ``class_balanced``.
        by: Column that holds the class.
        seed: Seed of the draws.
        start: The ``memory.jsonl`` of another run, whose rows come before this run's.
    """

    policy: Literal["class_balanced", "reservoir", "newest_first"] = "class_balanced"
    share: float | None = None
    rows: int | None = None
    capacity: int | None = None
    by: str = "completion"
    seed: int = 42
    start: str | None = None


BetweenTasks = Literal["continue", "new_adapter", "joint"] | Between


class ArmPlan(_Strict):
    """The changes of one arm of a sweep to the plan.

    Args:
        methods: Replaces the plan's.
        sft: Options added to the plan's, for every task that does not set them itself.
        peft: Options added to the plan's; None trains all weights.
        memory: Replaces the plan's.
        between_tasks: Replaces the plan's.
    """

    methods: Any = None
    sft: dict[str, Any] = {}
    peft: dict[str, Any] | None = None
    memory: Literal["forbidden"] | MemoryPlan | None = None
    between_tasks: BetweenTasks = "continue"


class BaselinesPlan(_Strict):
    """Plain fine-tuning at several learning rates, as further arms of a sweep.

    Args:
        learning_rates: Numbers, or factors of the plan's own rate, `sft.learning_rate`, as text: ``x``, ``x/3``, ``2x``.
    """

    learning_rates: list[float | str]


class SweepPlan(_Strict):
    """Several runs of one plan: every combination of arms, seeds and orders.

    Args:
        methods: Methods by the name of the arm.
        arms: Changes of each arm, by its name: methods and other keys; instead of `methods`.
        seeds: Seeds of training.
        orders: Names of the tasks in order, by the name of the order.
        baselines: Plain runs at several learning rates, in addition to the arms.
    """

    methods: dict[str, Any] | None = None
    arms: dict[str, ArmPlan] | None = None
    seeds: list[int] | None = None
    orders: dict[str, list[str]] | None = None
    baselines: BaselinesPlan | None = None


class Plan(_Strict):
    """A task sequence as data.

    Args:
        model: Folder or Hub id, or a mapping of `ModelPlan`'s fields.
        output_dir: Folder for all output.
        seed: Seed of training: order of the rows, new adapters, dropout.
        data_seed: Seed of `train_rows` and `test_rows`.
        peft: Options of `peft.LoraConfig`; with ``peft_type: PROMPT_TUNING`` those of a soft prompt; None trains all weights.
        sft: Options of `trl.SFTConfig` for every task.
        methods: Methods against forgetting, as in `ContinualConfig.methods`; ``rows: earlier_tasks`` stands for
            the training rows of earlier tasks, ``rows: kept`` for those that `memory` keeps.
        memory: The rows kept of each task for later ones; ``forbidden`` refuses every method that asks for such rows;
            None keeps none.
        between_tasks: ``continue`` (the adapter or the weights), ``new_adapter`` (earlier ones stay, frozen),
            ``{merge: ...}``, or ``joint``: the rows of all tasks in one run, the upper bound (multi-task learning, MTL).
        evaluation: The evaluation after each task.
        tasks: The tasks in order, or ``{benchmark: NAME, ...}`` for several.
        sweep: Several runs.
        baselines: The same as `sweep.baselines`: the plan, and plain runs at several learning rates.
        max_minutes: Minutes after which the run saves and stops, with exit code 75; the same command resumes it.
    """

    model: ModelPlan
    output_dir: str
    seed: int = 0
    data_seed: int = 0
    peft: dict[str, Any] | None = None
    sft: dict[str, Any] = {}
    methods: Any = None
    memory: Literal["forbidden"] | MemoryPlan | None = None
    between_tasks: BetweenTasks = "continue"
    evaluation: EvaluationPlan = EvaluationPlan()
    tasks: list[TaskPlan]
    sweep: SweepPlan | None = None
    baselines: BaselinesPlan | None = None
    max_minutes: float | None = Field(None, gt=0, strict=False)

    @field_validator("model", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @property
    def merge(self) -> MergePlan | None:
        """The merge between tasks, or None."""
        return self.between_tasks.merge if isinstance(self.between_tasks, Between) else None

    @property
    def joint(self) -> bool:
        """Whether all tasks are learned in one run."""
        return self.between_tasks == JOINT
