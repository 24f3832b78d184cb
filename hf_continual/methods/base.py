"""The protocol: what a continual-learning method is, and everything it may see of a run.

A method overrides two or three of the *hooks* below; every default does nothing.
Hooks add or edit, they never replace: rows are added, loss terms are added, gradients and
weights are edited in place in list order, and at most one method may supply the optimizer.

Shapes carry a suffix wherever two or more axes matter:
B batch, S sequence, D hidden, V vocabulary, R rank of an adapter, L layers, T tasks, M models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from datasets import Dataset

from hf_continual.methods.forward import PADDING, TASK, AddedRows, Forward
from hf_continual.methods.optimizer_choice import OptimizerChoice
from hf_continual.methods.run import Batch, Run
from hf_continual.paper import Paper
from hf_continual.plain import as_plain, hyper_parameters
from hf_continual.private import fingerprint_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from peft import PeftConfig
    from torch import Tensor, nn
    from torch.nn import Parameter

    from hf_continual.data.replay import ReplayRows
    from hf_continual.tasks import Task

State = dict[str, Any]  # values are tensors, or plain data that JSON can hold

__all__ = ["PADDING", "TASK", "AddedRows", "Batch", "Forward", "Method", "OptimizerChoice", "Run", "State"]


def _named(value: Any) -> Any:
    """Replace a value that is not plain data; a dataset becomes its fingerprint and length."""
    return {"rows": len(value), "fingerprint": fingerprint_of(value)} if isinstance(value, Dataset) else repr(value)


class Method:
    """A way of learning without forgetting. Subclasses are dataclasses of their hyper-parameters.

    Class attributes:
        name: Log prefix, state file and replay source. Lower case, no slash.
        paper: The paper it implements; None for an unpublished idea.
        taps: Module outputs wanted in `Forward.taps`: ``"last_hidden_state"``, or paths of modules
            below the causal language model such as ``"model.layers.3"``.
        places: Hyper-parameters that are locations, such as of rows or a cache; a resumed run may use another
            location. The content must be the same, which is checked for rows; a method checks the rest.
        state_with_model: Whether its state is small and needs no optimizer state, so `save_only_model` keeps it.
        leaves: Description of what `task_state` returns, for the model card.
        general_text: Whether the rows that it replays are general text, which belongs to no task.
        watches: Whether it only watches the run: it is in no description, card or hand-over, and is called last.
        keeps_rows: Whether `task_state` holds rows of data. They are handed to the next task on this machine, and are not
            pushed with the model unless requested by name.
        droppable: Whether a later task may run without the method; its state is then dropped, with a warning.
        outlives_merging: Whether its state is still valid after the adapter is merged into its base.
        bytes_per_parameter: Bytes it keeps per trainable parameter, on top of AdamW's two moments.
    """

    name: ClassVar[str]
    paper: ClassVar[Paper | None] = None
    taps: ClassVar[tuple[str, ...]] = ()
    bytes_per_parameter: ClassVar[float] = 0.0
    places: ClassVar[tuple[str, ...]] = ()
    state_with_model: ClassVar[bool] = False
    leaves: ClassVar[str] = ""
    general_text: ClassVar[bool] = False
    watches: ClassVar[bool] = False
    keeps_rows: ClassVar[bool] = False
    droppable: ClassVar[bool] = False
    outlives_merging: ClassVar[bool] = False

    def reads_forward(self) -> bool:
        """Whether `loss_terms` must be called; may depend on the hyper-parameters."""
        return type(self).loss_terms is not Method.loss_terms or self.weighs_tokens()

    def makes_rows(self) -> bool:
        """Whether `replay` has its rows only after `prepare`; it returns None before, and is called again then."""
        return False

    def reads_reference(self) -> bool:
        """Whether it reads whole weights before training, as a reference; ZeRO-3 has sharded them by then."""
        return False

    def reads_row_ids(self) -> bool:
        """Whether `Forward.row_BS` and `Forward.offset_BS` must be filled for task rows too."""
        return False

    def needs_earlier_task(self) -> bool:
        """Whether a first task is trained as without it: unless said, where it leaves a `task_state`. Joint training refuses it."""
        return type(self).task_state is not Method.task_state

    def added_rows(self) -> AddedRows | None:
        """The rows that `replay` will mix in, known before there is a run; None adds no rows."""
        return None

    def adapter(self) -> PeftConfig | None:
        """The modules that it brings and trains in place of `peft_config`, as a kind of `hf_continual.inference.kinds`.

        Asked before the model is loaded; a run has one such method at most. None brings none.
        """
        return None

    def previews(self) -> bool:
        """Whether a dry run loads the model, to show what `preview` says."""
        return type(self).preview is not Method.preview

    def preview(self, run: Run, folder: str) -> str:
        """What a dry run says of the method, from `Run.task_rows`, which are a few rows, and the model that the plan starts from.

        Args:
            run: The run; it does not train.
            folder: A folder for temporary files.

        Returns:
            A line that begins with the method's name.
        """
        return self.name

    @classmethod
    def row_sources(cls) -> tuple[str, ...]:
        """Hyper-parameters where a plan may put the rows of earlier tasks; by default `rows` and `memory`."""
        return tuple(name for name in hyper_parameters(cls) if name in ("rows", "memory"))

    def extra_steps(self, steps: int) -> int:
        """Forward and backward passes of the size of a step that a run of `steps` steps makes in addition."""
        return 0

    def extra_updates(self, steps: int) -> int:
        """Number of its calls of `Run.update()` or `Run.optimizer_step()` in a run of `steps` steps."""
        return 0

    def replay(self, run: Run) -> ReplayRows | None:
        """Hook 1: rows to mix into training."""
        return None

    def prepare_model(self, model: nn.Module, task: Task) -> None:
        """Hook 2: surgery on the model, before any wrapper and before the optimizer exists."""

    def load_task_state(self, state: State, run: Run) -> None:
        """Load what the method left when the previous task ended; see `task_state`.

        Called once at the start of training, before `prepare`, if the weights that training starts from come with such
        a state. Raises a `ValueError` for a state that does not fit the model.
        """

    def prepare(self, run: Run) -> None:
        """Long passes before the first step, with the weights that training starts from, also in a resumed run.

        Nothing is wrapped yet and no checkpoint is loaded. Cache what takes long, so that a killed run
        does not start over.
        """

    def edit_rows(self, run: Run, rows: Dataset) -> Dataset:
        """Relabel, drop or add to the task's own rows, tokenised for training, before they are used.

        Called after `prepare`, in list order; a resumed run must give the same rows.
        """
        return rows

    def optimizer(self, run: Run) -> OptimizerChoice | None:
        """Hook 3: an optimizer to use instead of the configured one; at most one method may supply it."""
        return None

    def begin_task(self, run: Run) -> None:
        """Called when everything is wrapped and loaded, just before the first step."""

    def begin_step(self, run: Run, batches: Sequence[Batch]) -> None:
        """Hook 3b: the micro-batches of an optimizer step are there, and nothing was computed from them.

        Make extra passes here, with `Run.gradients` and `Run.update`. A method may move the weights for the step's
        passes and put them back in `edit_gradients`, which is called before that of methods without this
        hook; at most one method of a run may have it.

        Args:
            run: The run.
            batches: This process's micro-batches on the device, replay rows included, not to be changed in place.
        """

    def loss_terms(self, forward: Forward) -> dict[str, Tensor]:
        """Hook 4: scalars to add to this micro-batch's loss, as means over it, by log name."""
        return {}

    def weighs_tokens(self) -> bool:
        """Whether `weigh_tokens` must be called; may depend on the hyper-parameters."""
        return type(self).weigh_tokens is not Method.weigh_tokens

    def weigh_tokens(self, forward: Forward) -> Tensor:
        """Hook 4, before all loss terms: the weight of each token of the task in the loss, without gradient.

        The weights of several methods are multiplied, loss terms see the weighed `Forward.token_loss_BS`, and the loss is
        divided by the same number of tokens as without them. Weights of replayed tokens are ignored.

        Args:
            forward: The micro-batch with the trainer's own token loss.

        Returns:
            Weights of shape (B, S - 1).
        """
        raise NotImplementedError

    def after_forward(self, run: Run) -> None:
        """Hook 4b: a micro-batch went forward in training, and its loss is there; not called for a method's own passes."""

    def edit_gradients(self, params: Mapping[str, Parameter]) -> None:
        """Hook 5: change `.grad` in place, after accumulation and clipping, before the step."""

    def after_step(self, run: Run) -> None:
        """Hook 6a: called when the weights have moved and the clipped gradients still exist.

        Here and in `end_step` weights may be edited in place, under ``torch.no_grad()`` and not through ``.data``: an
        optimizer that keeps residuals of weights in low precision must see the edit, so that it drops them.
        """

    def end_step(self, run: Run) -> None:
        """Hook 6b: called after the schedule, zeroed gradients and step count; before log, eval and save."""

    def measure(self, run: Run) -> dict[str, Tensor]:
        """Scalars that say what the method does, by name; asked for where a run's gauges are measured."""
        return {}

    def logged(self, run: Run) -> dict[str, Tensor | float]:
        """Values to log as ``NAME/key`` with the loss, asked for only at the trainer's logging steps, on every process.

        A tensor stays on the device until the log is written; return it without `.item()`.
        """
        return {}

    def weights_replaced(self, run: Run) -> None:
        """Called when a rule put earlier weights back: drop what was meant for those that are gone."""

    def end_task(self, run: Run) -> None:
        """Hook 7: called when training of this task is over."""

    def renew(self) -> None:
        """Reset to the state at construction, so that nothing learned is carried over to another trainer."""
        built = self.__dict__.get("_built")
        if built is None:
            self.__dict__["_built"] = dict(self.__dict__)
            return
        self.release()
        self.__dict__.clear()
        self.__dict__.update(built, _built=built)

    def release(self) -> None:
        """Remove every hook from the model; called when `train` ends in any way, also after an error."""

    def task_state(self, run: Run) -> State:
        """Return what later tasks need, as tensors and plain data; called on every process after `end_task`.

        It is saved with the model as ``continual/NAME.safetensors`` and ``NAME.json``, and is loaded by the next run
        that trains it further. No rows of data: they would be published with the model, unless the class says `keeps_rows`.
        """
        return {}

    def state_dict(self, run: Run) -> State:
        """Everything learned since construction that a resumed run cannot rebuild.

        Called on every process while a checkpoint is written, before the optimizer is saved; what
        process 0 returns is written.
        """
        return {}

    def load_state_dict(self, state: State, run: Run) -> None:
        """Load what `state_dict` returned; called before `begin_task` of a resumed run."""

    def describe(self) -> dict[str, Any]:
        """Hyper-parameters as plain data, for configuration files, resume checks and model cards."""
        return {name: as_plain(getattr(self, name), _named) for name in hyper_parameters(type(self))}
