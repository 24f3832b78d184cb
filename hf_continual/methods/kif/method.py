r"""Recurrent-KIF: an inner learner for the new task, an outer one for old rows, fused by importance.

Feng et al., "Recurrent Knowledge Identification and Fusion for Language Model Continual Learning", ACL 2025,
https://arxiv.org/abs/2502.17510.

Every Q = `inner_steps` steps on the new task are followed by M = `outer_steps` steps on a small buffer of old rows.
Both measure the importance of every weight (`hf_continual.tensors.importance`), and their movements are fused element
by element (`hf_continual.tensors.fusion`):

    theta_{b+1} = theta_b + w_in tau_in + w_out tau_out,    m = score > its (1 - top_share) quantile

The paper's text and its published code differ; `rule="paper"` and `rule="code"` are the two, and `published` returns
each published setting by name.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from datasets import Dataset

from hf_continual.bounds import between, one_of, whole_number
from hf_continual.data.replay import RowType
from hf_continual.data.rows import load_rows
from hf_continual.methods.base import Method, Run, State
from hf_continual.methods.kif.flat_adam import FlatAdam
from hf_continual.methods.kif.two_sides import RULES, Fusion, Rule, TwoSides
from hf_continual.paper import Paper
from hf_continual.tensors.flat import Flat, bytes_of
from hf_continual.tensors.importance import Order, Scope

logger = logging.getLogger(__name__)

# The values of each published setting; all share Q = 8, M = 4, the top 20 %, and decays of 0.85.
PUBLISHED: dict[str, dict[str, Any]] = {
    # The text of the paper: importance without the uncertainty product, 0/1 masks, a separate learner.
    "paper": {"rule": "paper", "uncertainty": False, "outer_optimizer": "separate", "outer_learning_rate": 1e-3},
    # The code for T5 (fp32): outer steps use the inner optimizer, and their loss is divided by 4 accumulation steps.
    "t5": {"rule": "code", "uncertainty": True, "outer_optimizer": "shared", "outer_loss_scale": 0.25},
    # The code for LLaMA (fp16): the outer learning rate is always 0, so the buffer only steers the masks.
    "llama": {"rule": "code", "uncertainty": True, "outer_optimizer": "none", "outer_loss_scale": 0.25},
}

CHOICES = {
    "rule": RULES,
    "scope": ("global", "tensor"),
    "outer_optimizer": ("separate", "shared", "none"),
    "order": ("first", "second", "mixed"),
    "old_importance": ("recurrent", "static"),
}


@dataclass
class KIF(Method):
    """Alternate between the new task and a buffer of old rows; fuse both movements by each weight's importance.

    Measured: worse than the same rows mixed in (`Replay`) at equal steps and tokens: 56 against 88 % of all tasks' answers
    with 12 rounds a task (recipes/kif_rounds), about equal with two. Prefer ``replay: {rows: kept, ratio: 0.33}``.

    Idea: a few steps on old rows tell which weights matter to old tasks *now*; the new task's change is kept where
    only the new task needs a weight, the buffer's repair where only old tasks do.
    Hooks: rows (a separate buffer, not mixed into the batches), after step.
    Cost: M steps on the buffer per Q on the task; at most 6 float32 values per trainable weight (5, and masks), 2 more
    for the moments of a separate outer learner.
    Relations: `Replay` mixes the same rows into every batch. Composes with everything; edits of gradients by other
    methods do not reach the outer steps.
    Differs from the authors' code: the outer learner learns (theirs for LLaMA has rate 0), steps are counted instead of
    micro-batches, the loss on the buffer is its token mean, and a run resumes at any step.

    Args:
        memory: Rows of earlier tasks, of the task's type: a dataset, a list, a file or a Hub id; in a plan
            ``kept`` or ``earlier_tasks``. None or empty only for a first task, which is then plain training.
        inner_steps: Q, optimizer steps on the task per round.
        outer_steps: M, optimizer steps on the buffer per round.
        top_share: Fraction of the weights that matter to a side.
        beta1: Decay of the importance.
        beta2: Decay of its uncertainty.
        rule: ``"paper"``, ``"code"``, or an ablation: ``"no_shared"`` (weights that matter to both stay), ``"adaptive"``
            (sigmoid of the score difference), ``"weighted"`` (one weight for all), ``"sum"`` (no identification).
        scope: One threshold over all weights, or one per tensor.
        outer_optimizer: ``"separate"``: its own Adam; ``"shared"``: the run's optimizer; ``"none"``: the buffer is only
            measured.
        outer_learning_rate: Peak rate of a separate outer learner, which follows the run's schedule; None: `Run.learning_rate`.
        order: Taylor terms of the sensitivity.
        importance_every: Steps between two measurements; the last step of a round is always measured.
        uncertainty: Whether the score is importance times uncertainty (the code) or importance alone (the paper).
        old_importance: ``"recurrent"``, or the ablation ``"static"``: for old tasks, measured in the first round only.
        temperature: Of ``rule="adaptive"``.
        outer_loss_scale: Factor of the loss on the buffer.
        memory_batch: Rows of a micro-batch of the buffer; None: as many as of the task. See `Run.micro_batches`.
        row_type: As in `Replay`.
        name: Prefix of the logged values.

    Raises:
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If one is out of range, or `memory` is empty in a later task.
    """

    memory: Dataset | str | list[dict[str, Any]] | None = None
    inner_steps: int = 8
    outer_steps: int = 4
    top_share: float = 0.2
    beta1: float = 0.85
    beta2: float = 0.85
    rule: Rule = "paper"
    scope: Scope = "global"
    outer_optimizer: Literal["separate", "shared", "none"] = "separate"
    outer_learning_rate: float | None = None
    order: Order = "first"
    importance_every: int = 1
    uncertainty: bool = False
    old_importance: Literal["recurrent", "static"] = "recurrent"
    temperature: float = 1.0
    outer_loss_scale: float = 1.0
    memory_batch: int | None = None
    row_type: RowType = "same"
    name: str = "kif"  # pyrefly: ignore[bad-override]

    bytes_per_parameter: ClassVar[float] = 30.0  # five buffers, two mask bytes while they are fused, two moments
    places: ClassVar[tuple[str, ...]] = ("memory",)
    paper: ClassVar[Paper] = Paper(
        "Recurrent Knowledge Identification and Fusion for Language Model Continual Learning",
        "Feng et al.",
        2025,
        arxiv="2502.17510",
        venue="ACL 2025",
    )
    _memory: Dataset | None = field(default=None, init=False, repr=False, compare=False)
    _flat: Flat | None = field(default=None, init=False, repr=False, compare=False)
    _sides: TwoSides | None = field(default=None, init=False, repr=False, compare=False)
    _learner: FlatAdam | None = field(default=None, init=False, repr=False, compare=False)
    _resumed: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for key, known in CHOICES.items():
            one_of("KIF", key, getattr(self, key), known)
        for key in ("inner_steps", "outer_steps", "importance_every", "memory_batch"):
            if getattr(self, key) is not None:
                whole_number("KIF", key, getattr(self, key))
        between("KIF", "top_share", self.top_share, 0, 1, closed="]")
        for key in ("beta1", "beta2"):
            between("KIF", key, getattr(self, key), 0, 1)
        for key in ("temperature", "outer_loss_scale", "outer_learning_rate"):
            if getattr(self, key) is not None:
                between("KIF", key, getattr(self, key), 0, float("inf"))
        if self.outer_learning_rate is not None and self.outer_optimizer != "separate":
            raise ValueError(
                f"KIF(outer_learning_rate={self.outer_learning_rate!r}) belongs to outer_optimizer='separate'; "
                f"{self.outer_optimizer!r} has no separate rate."
            )
        if self.importance_every > self.inner_steps:
            raise ValueError(
                f"KIF(importance_every={self.importance_every}) is more than the {self.inner_steps} inner steps of a round."
            )
        # Read now: a wrong path must fail before a model is loaded, not after.
        empty = self.memory is None or (not isinstance(self.memory, str) and len(self.memory) == 0)
        self._rows = None if empty else load_rows(self.memory)  # pyrefly: ignore[bad-argument-type]

    @classmethod
    def published(cls, setting: str, memory: Any = None, **changes: Any) -> KIF:
        """A setting of `PUBLISHED` by name, with deliberate changes."""
        if setting not in PUBLISHED:
            raise ValueError(f"KIF.published({setting!r}): there are {', '.join(PUBLISHED)}.")
        return cls(memory, **{**PUBLISHED[setting], **changes})

    def extra_steps(self, steps: int) -> int:
        """The outer steps."""
        return 0 if self._rows is None else steps // self.inner_steps * self.outer_steps

    def extra_updates(self, steps: int) -> int:
        """The outer steps, if the run's optimizer makes them."""
        return self.extra_steps(steps) if self.outer_optimizer == "shared" else 0

    def replay(self, run: Run) -> None:
        """Tokenise the buffer; nothing is mixed into the batches."""
        if self._rows is not None:
            self._memory = run.prepare(self._rows, self.row_type, self.name)
        elif run.task.index > 0:
            raise ValueError(
                f"KIF: task {run.task.index} ({run.task.name!r}) has no rows of earlier tasks, and without them nothing "
                f"tells which weights matter to them. Give memory=ROWS (in a plan memory: earlier_tasks), or drop KIF."
            )
        else:
            logger.info("KIF: the first task has no rows of earlier tasks; it is plain training.")

    def begin_task(self, run: Run) -> None:
        """Allocate the buffers, unless a checkpoint has filled them."""
        if self._memory is not None and not self._resumed:
            self._set_up(run)
        self._resumed = False

    def _set_up(self, run: Run) -> None:
        params = run.named_parameters()
        if not params:
            raise ValueError(
                "KIF: no parameter is trainable, so there is nothing to measure or fuse. Freeze less, or give an adapter."
            )
        self._done = self._outer = 0
        self._flat = flat = Flat(params, run.optimizer)
        self._learner = None
        if self.outer_optimizer == "separate":
            defaults = run.optimizer_defaults()
            self._learner = FlatAdam(flat, defaults["betas"], defaults["eps"])
        own = {f.name: getattr(self, f.name) for f in fields(Fusion)}
        add_up = run.sum if run.is_sharded else None
        self._sides = None if self.rule == "sum" else TwoSides(flat, Fusion(**own), add_up)

    def after_step(self, run: Run) -> None:
        """Record an inner step: the new weights and the clipped gradient that moved them."""
        if self._memory is None:
            return
        self._done += 1
        if self._sides is not None and (self.inner_steps - self._done) % self.importance_every == 0:
            self._sides.record(self._sides.inner)

    def end_step(self, run: Run) -> None:
        """After the last inner step of a round, make the outer steps and fuse."""
        if self._memory is None or self._done < self.inner_steps:
            return
        sides = self._sides
        if sides is not None:
            sides.end_inner()
        if sides is not None or self.outer_optimizer != "none":
            for step in range(self.outer_steps):
                self._outer_step(run, (self.outer_steps - 1 - step) % self.importance_every == 0)
        if sides is not None:
            for key, share in sides.fuse().items():
                run.note(f"{self.name}/{key}", share)
        self._done = 0

    def _outer_step(self, run: Run, measure: bool) -> None:
        assert self._memory is not None
        loss = run.gradients(run.micro_batches(self._memory, self._outer, self.memory_batch), self.outer_loss_scale)
        rate = (self.outer_learning_rate or run.learning_rate) * run.schedule

        def move() -> None:
            if self._learner is not None:
                self._learner.step(rate)

        stepped = run.update(None if self.outer_optimizer == "shared" else move)
        first_round = self._outer < self.outer_steps
        if stepped and measure and self._sides is not None and (self.old_importance == "recurrent" or first_round):
            self._sides.record(self._sides.outer)
        run.zero_grad()
        run.note(f"{self.name}/memory_loss", loss)
        self._outer += 1

    def end_task(self, run: Run) -> None:
        """Log steps that were not fused or not measured."""
        if self._memory is not None and self._done:
            logger.info(
                "KIF: the last %d steps do not make a full round of %d: not fused.", self._done, self.inner_steps
            )
        if self._sides is not None and (count := int(self._sides.left_out)):
            logger.warning("KIF: %d steps had gradients that were not finite; the importance skips them.", count)

    def memory_bytes(self) -> int:
        """Bytes of all buffers on this process, masks and moments of the outer learner included."""
        owners = [part.kept() for part in (self._sides, self._learner) if part is not None]
        return bytes_of([buffer for buffers in owners for buffer in buffers])

    def state_dict(self, run: Run) -> State:
        """Buffers by parameter name, and the position within the round."""
        if self._flat is None:
            return {}
        state: State = {"done": self._done, "outer": self._outer}
        for key, buffer in self._kept().items():
            state |= self._flat.named(buffer, f"{key}/", run.is_main_process)
        if self._learner is not None:
            state["learner"] = self._learner.t
        if self._sides is not None:
            state["left_out"] = self._sides.left_out
        return state

    def _kept(self) -> dict[str, torch.Tensor]:
        """The tensors that the rest of the run needs: right after a fusion, not the anchor and the inner averages."""
        kept = {} if self._sides is None else self._sides.buffers()
        if self._done == 0:
            kept = {k: v for k, v in kept.items() if k.startswith("outer")}
        if self._learner is not None:
            kept |= dict(zip(("learner.first", "learner.second"), self._learner.moments, strict=True))
        return kept

    def load_state_dict(self, state: State, run: Run) -> None:
        """Fill the buffers."""
        if self._memory is None or not state:
            return
        self._set_up(run)
        self._resumed = True
        self._done, self._outer = state["done"], state["outer"]
        assert self._flat is not None
        for key, buffer in self._kept().items():
            self._flat.fill(buffer, state, f"{key}/")
        if self._learner is not None:
            self._learner.t = state["learner"]
        if self._sides is not None:
            self._sides.left_out = state["left_out"].to(self._flat.device)
