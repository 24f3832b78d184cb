"""The protocol: what a continual-learning method is, and all that it may see of a run.

A method overrides two or three *hooks* of the calls below; every default does nothing.
Hooks add or edit, they never replace: rows are added, loss terms are added, gradients and
weights are edited in place in list order, and at most one method brings an optimizer.

Shapes carry a suffix wherever two axes or more matter:
B batch, S sequence, D hidden, V vocabulary, R rank of an adapter, L layers, T tasks, M models.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from datasets import Dataset

from hf_continual.methods.optimizer_choice import OptimizerChoice
from hf_continual.methods.run import Batch, Run
from hf_continual.paper import Paper
from hf_continual.plain import as_plain, hyper_parameters
from hf_continual.private import fingerprint_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn
    from torch.nn import Parameter

    from hf_continual.data.replay import ReplayRows
    from hf_continual.tasks import Task

State = dict[str, Any]  # values are tensors, or plain data that JSON can hold

__all__ = ["PADDING", "TASK", "AddedRows", "Batch", "Forward", "Method", "OptimizerChoice", "Run", "State"]

TASK, PADDING = -1, -100


def _named(value: Any) -> Any:
    """What stands for a value that is not plain data; a dataset becomes its fingerprint and length."""
    return {"rows": len(value), "fingerprint": fingerprint_of(value)} if isinstance(value, Dataset) else repr(value)


@dataclass(frozen=True)
class Forward:
    """One micro-batch after its single forward pass, everything with its graph.

    Attributes:
        inputs: What the model was called with (`input_ids`, `labels`, `attention_mask` or positions).
        token_loss_BS: Loss of predicting token t + 1 at position t, zero where the label is ignored;
            shape (B, S - 1).
        taps: Outputs of the modules named in `Method.taps`, by that name.
        source_BS: Where each token comes from: -1 the task, k the k-th replay source, -100 padding. Virtual tokens of
            prompt learning stand in front of each row, here and in all other shapes, as padding.
        row_BS: Index of the token's row within its replay source; of a task token within `Run.task_rows`, where a method
            asks for it (`Method.reads_row_ids`), else -1; -1 for padding.
        offset_BS: Position of the token within that row; -1 where `row_BS` is.
        sources: Names of the replay sources; `source_BS` indexes this tuple.
        tokens: Number of (weighted) loss tokens of the whole optimizer step over all processes, by
            which the trainer divides the summed token loss.
        drawn: ``(source, row, tokens)`` of each replay row in this micro-batch, in the order of its tokens; on the
            host, so that a method can fetch what it keeps of a row without asking the accelerator.
        entropy_BS: Entropy in nats of the prediction at position t, without gradient; shape (B, S - 1).
        notes: See `note`.
        scale: What a sum of token losses over `tokens` is multiplied with to be in the unit of a
            loss term (processes, accumulation steps).
    """

    inputs: Mapping[str, Tensor]
    token_loss_BS: Tensor
    taps: Mapping[str, Tensor]
    source_BS: Tensor
    row_BS: Tensor
    offset_BS: Tensor
    sources: tuple[str, ...]
    tokens: Tensor
    scale: float
    drawn: Sequence[tuple[int, int, int]] = ()
    entropy_BS: Tensor | None = None
    notes: dict[str, tuple[Tensor | float, Tensor | float]] = field(default_factory=dict)

    def note(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Log a value that is no loss term: the mean ``total / count`` over the logged steps, under the method's name."""
        self.notes[name] = (total, count)

    def mask(self, source: str | None = None) -> Tensor:
        """Tokens of a replay source, or of the task for None; bool of shape (B, S)."""
        return self.source_BS == (TASK if source is None else self.sources.index(source))

    def label_mask(self, source: str | None = None) -> Tensor:
        """Positions of `token_loss_BS` that predict a token of this source; bool of shape (B, S - 1)."""
        return self.mask(source)[:, 1:] & (self.inputs["labels"][:, 1:] != PADDING)

    def token_mean(self, values_BS: Tensor) -> Tensor:
        """Reduce per-token values exactly as the trainer reduces the token loss.

        A term made with it is independent of how the tokens fall into micro-batches and processes.

        Args:
            values_BS: One value per position of `token_loss_BS`, zero where it must not count.

        Returns:
            Scalar whose contribution to the step's loss is ``values.sum() / tokens``.
        """
        return values_BS.sum() / self.tokens * self.scale


@dataclass(frozen=True)
class AddedRows:
    """Rows that a method mixes into each micro-batch, as far as its hyper-parameters say.

    Args:
        ratio: Their share of the tokens of the mix, or None.
        per_batch: Their number in each micro-batch of each process, or None.
        weight: Weight of one of their tokens in the loss.
        max_length: Tokens of such a row at which the method cuts it, or None.
    """

    ratio: float | None = None
    per_batch: int | None = None
    weight: float = 1.0
    max_length: int | None = None


class Method:
    """A way of learning without forgetting. Subclasses are dataclasses of their hyper-parameters.

    Class attributes:
        name: Log prefix, state file and replay source. Lower case, no slash.
        paper: What it implements; None for an idea of one's own.
        taps: Module outputs wanted in `Forward.taps`: ``"last_hidden_state"``, or paths of modules
            below the causal language model such as ``"model.layers.3"``.
        places: Hyper-parameters that say where something lies, such as rows or a cache; a resumed run may name another
            place. What lies there must be the same, which is checked for rows; a method checks the rest.
        state_with_model: Whether its state is small and needs no optimizer's, so that `save_only_model` keeps it.
        leaves: What `task_state` returns, in words for the model card.
        droppable: Whether a later task may go without the method; what it left is then left behind, with a warning.
        outlives_merging: Whether what it left still holds once the adapter was merged into its base.
        bytes_per_parameter: What it keeps for each trainable parameter beside AdamW's two moments, in bytes.
    """

    name: ClassVar[str]
    paper: ClassVar[Paper | None] = None
    taps: ClassVar[tuple[str, ...]] = ()
    bytes_per_parameter: ClassVar[float] = 0.0
    places: ClassVar[tuple[str, ...]] = ()
    state_with_model: ClassVar[bool] = False
    leaves: ClassVar[str] = ""
    droppable: ClassVar[bool] = False
    outlives_merging: ClassVar[bool] = False

    def reads_forward(self) -> bool:
        """Whether `loss_terms` must be called; a method may answer by its hyper-parameters."""
        return type(self).loss_terms is not Method.loss_terms

    def makes_rows(self) -> bool:
        """Whether `replay` has its rows only after `prepare`; it is called again then, and returns None before."""
        return False

    def reads_reference(self) -> bool:
        """Whether it reads whole weights before training, as a reference; ZeRO-3 has spread them by then."""
        return False

    def reads_row_ids(self) -> bool:
        """Whether `Forward.row_BS` and `Forward.offset_BS` must be filled for task rows too."""
        return False

    def needs_earlier_task(self) -> bool:
        """Whether a first task is trained as without it: unless said, where it leaves a `task_state`. Joint training refuses it."""
        return type(self).task_state is not Method.task_state

    def added_rows(self) -> AddedRows | None:
        """What `replay` will mix in, told before there is a run; None adds no rows."""
        return None

    @classmethod
    def row_sources(cls) -> tuple[str, ...]:
        """Hyper-parameters that name rows, where a plan may put the rows of earlier tasks: unless said, `rows` and `memory`."""
        return tuple(name for name in hyper_parameters(cls) if name in ("rows", "memory"))

    def extra_steps(self, steps: int) -> int:
        """Forward and backward passes of the size of a step that a run of so many steps makes beside them."""
        return 0

    def extra_updates(self, steps: int) -> int:
        """How often it calls `Run.update()` or `Run.optimizer_step()` in a run of so many steps."""
        return 0

    def replay(self, run: Run) -> ReplayRows | None:
        """Hook 1: rows to mix into training."""
        return None

    def prepare_model(self, model: nn.Module, task: Task) -> None:
        """Hook 2: surgery on the model, before any wrapper and before the optimizer exists."""

    def load_task_state(self, state: State, run: Run) -> None:
        """Take over what the method left when the task before ended; see `task_state`.

        Called once at the start of training, before `prepare`, if the weights that training starts from have such a
        state beside them. Refuses a state that does not fit the model with a `ValueError`.
        """

    def prepare(self, run: Run) -> None:
        """Long passes before the first step, with the weights that training starts from, also in a resumed run.

        Nothing is wrapped yet and no checkpoint is loaded. What takes long belongs into a cache, so that a killed run
        does not begin again.
        """

    def edit_rows(self, run: Run, rows: Dataset) -> Dataset:
        """Re-label, drop or add to the task's own rows, tokenised as they are trained, before they are used.

        Called after `prepare`, in list order; a resumed run must give the same rows.
        """
        return rows

    def optimizer(self, run: Run) -> OptimizerChoice | None:
        """Hook 3: an optimizer in place of the configured one; at most one method brings one."""
        return None

    def begin_task(self, run: Run) -> None:
        """Everything is wrapped, loaded and about to start."""

    def begin_step(self, run: Run, batches: Sequence[Batch]) -> None:
        """Hook 3b: the micro-batches of an optimizer step are there, and nothing was computed from them.

        Passes of one's own are made here with `Run.gradients` and `Run.update`. A method may leave the weights elsewhere for
        the step's own passes, and puts them back in `edit_gradients`, which is called before that of methods without this
        hook; at most one method of a run has it.

        Args:
            run: The run.
            batches: This process's micro-batches on the device, replay rows included, not to be changed in place.
        """

    def loss_terms(self, forward: Forward) -> dict[str, Tensor]:
        """Hook 4: scalars to add to the loss of this micro-batch, means over it, by log name."""
        return {}

    def edit_gradients(self, params: Mapping[str, Parameter]) -> None:
        """Hook 5: change `.grad` in place, after accumulation and clipping, before the step."""

    def after_step(self, run: Run) -> None:
        """Hook 6a: the weights have moved and the clipped gradients are still there.

        Here and in `end_step` weights may be edited in place, under ``torch.no_grad()`` and not through ``.data``: an
        optimizer that keeps residuals of weights in low precision must see the edit, and drops them.
        """

    def end_step(self, run: Run) -> None:
        """Hook 6b: schedule stepped, gradients zeroed, step counted; before log, eval and save."""

    def end_task(self, run: Run) -> None:
        """Hook 7: training of this task is over."""

    def renew(self) -> None:
        """Be as it was built: a method that is given to another trainer takes nothing along that it learned in the last."""
        built = self.__dict__.get("_built")
        if built is None:
            self.__dict__["_built"] = dict(self.__dict__)
            return
        self.release()
        self.__dict__.clear()
        self.__dict__.update(built, _built=built)

    def release(self) -> None:
        """Take every hook off the model: `train` has ended, in whatever way; called after an error too."""

    def task_state(self, run: Run) -> State:
        """What later tasks need: tensors and plain data, called on every process after `end_task`.

        It is saved with the model as ``continual/NAME.safetensors`` and ``NAME.json``, and goes with it to whoever trains
        on. No rows of data: they would be published with the model.
        """
        return {}

    def state_dict(self, run: Run) -> State:
        """Everything learnt since construction that a resumed run cannot rebuild.

        Called on every process while a checkpoint is written, before the optimizer is saved; what
        process 0 returns is written.
        """
        return {}

    def load_state_dict(self, state: State, run: Run) -> None:
        """Take back what `state_dict` returned; called before `begin_task` of a resumed run."""

    def describe(self) -> dict[str, Any]:
        """Hyper-parameters as plain data, for configuration files, resume checks and model cards."""
        return {name: as_plain(getattr(self, name), _named) for name in hyper_parameters(type(self))}
