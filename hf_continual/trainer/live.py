"""The part of a trainer with methods that its parts see: transformers' Trainer, and the state that its methods share.

The parts import this class and the trainers import the parts, so that imports point one way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import Trainer as _Below

    from hf_continual.data.handover import HandOver
    from hf_continual.methods.base import Method
    from hf_continual.methods.compose import Methods
    from hf_continual.methods.run import Run
    from hf_continual.trainer.ledger import Ledger
    from hf_continual.trainer.mixer import ReplayMixer
    from hf_continual.trainer.tap import ForwardTap
else:
    _Below = object  # any class of trainers is put below


class LiveTrainer(_Below):
    """A trainer with the attributes of a run with methods; no behaviour."""

    # HF declares these more narrowly, or more widely, than the trainers' actual values.
    args: Any
    model: Any
    model_wrapped: Any
    data_collator: Any
    optimizer: Any
    processing_class: Any
    hub_model_id: Any
    completion_only_loss: Any

    methods: Methods
    run: Run
    options: Any
    """Where `task_name`, `predecessor` and `fresh_methods` are: the training arguments, or `TaskOptions`."""
    listeners: list[Method]
    """The methods that are told of each forward pass of training."""
    is_aside: bool = False
    """Whether the passes now being made are a method's own, which no method is told of."""
    mixer: ReplayMixer | None
    """Draws replay rows; None if there are none."""
    step_batches: list[Any]
    """The micro-batches of the optimizer step that begins, if a method asks for them."""
    tap: ForwardTap | None
    """Records the forward pass; None if no method reads it."""
    ledger: Ledger
    """The methods' values for the next log."""
    task_row: dict[str, Any]
    """The first raw row of the task, whose type replay rows must match."""
    row_digests: dict[str, str]
    """A fingerprint of each method's rows, by its name."""
    task_states: dict[str, dict[str, Any]] | None
    """State that methods leave for the next task; None until the task has ended."""
    predecessor: HandOver | None
    """State that methods of the previous task left."""
    rows_as_given: Any
    """The task's rows before methods edited them."""
    given_optimizer: torch.optim.Optimizer | None
    """The optimizer that was given as an object."""
    ended: str | None = None
    """Why a rule ended training before its last step."""
    stopping: bool = False
    """Whether the run was asked to stop before its task ended."""
    started_at: tuple[int, int] | None = None
    """Optimizer step at which training began in this process, above 0 after a resume, and the tokens until then."""
    told_to_stop: str | None = None
    """What requested the stop, if it came as the last step ended."""

    if TYPE_CHECKING:

        def replay_totals(self) -> np.ndarray | None:
            """Task tokens, replayed tokens and rows drawn, over all processes; None if no rows are added."""

        def mix_prepared_rows(self) -> None:
            """Add rows that methods have made in `prepare`."""

        def is_compiled(self) -> bool:
            """Whether the forward pass is compiled."""
