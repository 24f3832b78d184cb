r"""RecAdam: Adam that recalls the pretrained weights.

Chen et al., "Recall and Learn: Fine-tuning Deep Pretrained Language Models with Less Forgetting",
EMNLP 2020, https://arxiv.org/abs/2004.12651.

Learning the task and recalling the pretrained weights theta* form one objective whose weights are annealed:

    Loss(t) = lambda(t) Loss_T + (w - lambda(t)) Loss_S,      Loss_S = gamma / 2 * |theta - theta*|^2
    lambda(t) = w / (1 + exp(-k (t - t0)))                     (sigmoid; or linear, constant)

Both are decoupled from Adam's moments, like AdamW's decay. One update with gradient g:

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   a = lr sqrt(1 - b2^t) / (1 - b1^t)
    theta <- theta - a lambda m / (sqrt(v) + eps)
    theta <- theta - r (theta - theta*),                       r = lr (w - lambda) gamma
    theta <- theta - lr wd theta

t counts the updates of the parameter itself. The recall uses the theta already moved by Adam: a linear interpolation
with fraction r, from 0 to 1. `anneal="none"` is its limit (L2-SP, decoupled): lambda = 1 and r = lr gamma always.

`fisher` restores the F_i of the quadratic term, gamma / 2 sum_i F_i (theta_i - theta*_i)^2, which the paper derives and
its optimizer replaces by one scalar: r becomes min(1, r F_i), with F over its mean (`recall`); a constant F is the
scalar form.

Differs from the authors' code: the pretrained weights are each parameter's value at the first step (or named tensors),
an unknown schedule and r outside [0, 1] are refused, and `floor` keeps some protection after t0.

Memory per parameter on top of weight and gradient: fp32 12 bytes (m, v, theta*; Adam has 8); bf16 and fp16
14 bytes (m, v and the rounding error in fp32, theta* in the parameter's dtype), so that the weights are those of an
fp32 run, rounded. `pull_every` adds nothing, `fisher` adds 4 bytes, also in checkpoints.

`pull_every=n` reads theta* at every n-th update only. In between theta moves by Adam alone; the n-th pull then goes the
compounded fraction 1 - prod_i (1 - r_i) of the way. Without gradient this is what n pulls do; with one, what Adam did
within the window is pulled by the whole fraction. The owed pull is part of the state; the end of training applies it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from datasets import Dataset

from hf_continual.bounds import between, number, one_of, whole_number
from hf_continual.data.replay import RowType
from hf_continual.data.rows import load_rows
from hf_continual.methods.base import Method, OptimizerChoice, Run, State
from hf_continual.methods.fisher import FisherKind
from hf_continual.methods.recadam.anchored import moved, pull_now, read_anchors, say, weigh
from hf_continual.methods.recadam.optimizer import RecAdamOptimizer
from hf_continual.methods.recadam.recall import SAVED
from hf_continual.methods.recadam.schedule import Anneal, check_options
from hf_continual.paper import Paper
from hf_continual.tensors.anchors import base_of, fingerprint, read_again, recorded_base, state_of

logger = logging.getLogger(__name__)


@dataclass
class RecAdam(Method):
    """Adam with an annealed pull to the weights that training started from.

    Idea: every step also goes a small fraction of the way back to the pretrained weights. The paper lets go of them after
    `t0`; `floor` or `anneal="none"` (decoupled L2-SP) keep the pull, which is what protects in the long run.
    Hooks: optimizer; composes with everything except another one. Cost: one more tensor is kept, and read per step.

    With new LoRA adapters there are no pretrained values: the anchor is the fresh adapter (A as drawn,
    B = 0), so the pull shrinks what the adapter adds. An adapter of the previous task is its own anchor.

    Args:
        anneal: ``"sigmoid"`` (paper), ``"linear"``, ``"constant"`` (no recall at all) or ``"none"`` (L2-SP).
        k: Steepness of the sigmoid per optimizer step; the paper searches 0.05 to 1.
        t0: Update at which task and recall have equal weight; if strictly between 0 and 1, a fraction of all updates of
            the run, including those that another method adds (KIF's outer steps, if they share the optimizer). The
            paper's 250 is 0.4 to 19 % of its runs; before t0 little of the task is learned.
        anchor_strength: gamma of the paper, for learning rates around 2e-5.
        pull: Instead of `anchor_strength`: the fraction r itself at the peak learning rate, such as 0.01, whatever
            learning rate a group has. LoRA's learning rates need it, since r = lr * gamma. It follows the schedule of
            the learning rate, and is 0 in a group whose rate is 0.
        floor: Minimum weight of the recall after t0, 0 to 1; 0 is the paper, where protection vanishes.
        anneal_w: Sum of both weights.
        correct_bias: Whether to apply Adam's bias correction.
        out_of_range: ``"error"`` or ``"clamp"`` for r outside [0, 1].
        groups: Options by regular expression on the parameter's name, such as ``{"lm_head": {"anneal_w": 0.0}}`` for a
            new head. First match wins. `t0` may be a fraction of the run, too.
        pull_every: Updates between two pulls; 1 pulls at each one. 8 makes a step about as fast as AdamW's.
        anchor: ``"start"``, or the folder or Hub id of the checkpoint or adapter to stay near; an adapter may have any name.
            Checkpoints hold the anchors, unless they are the weights of a Hub id or of a folder outside the run's that
            is not a trainer's checkpoint; those are read again, from the model's current or recorded location.
        fisher: Use the diagonal Fisher information of each weight instead of one scalar: general or old rows, measured
            at the weights that training starts from (in a plan ``earlier_tasks``), or the ``continual/ewc.safetensors``
            of a model. It is divided by its mean, so that r is the mean fraction; a weight goes min(1, r F) of the way.
        fisher_kind: ``"batch"`` squares the gradient of batches, ``"sample"`` that of single rows.
        fisher_rows: Maximum number of rows to measure, drawn with the run's seed; None: all.
        fisher_row_type: As in `Replay`.

    Raises:
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If a hyper-parameter is out of range, or no parameter is anchored.
    """

    anneal: Anneal = "sigmoid"
    k: float = 0.5
    t0: float = 250
    anchor_strength: float | None = None
    pull: float | None = None
    floor: float = 0.0
    anneal_w: float = 1.0
    correct_bias: bool = True
    out_of_range: Literal["error", "clamp"] = "error"
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    pull_every: int = 1
    anchor: str = "start"
    fisher: Dataset | str | list[dict[str, Any]] | None = None
    fisher_kind: FisherKind = "batch"
    fisher_rows: int | None = None
    fisher_row_type: RowType = "same"
    _measured: Dataset | None = field(default=None, init=False, repr=False, compare=False)
    _record: State | None = field(default=None, init=False, repr=False, compare=False)
    _base_state: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    name: ClassVar[str] = "recadam"
    bytes_per_parameter: ClassVar[float] = 4.0  # the anchor
    places: ClassVar[tuple[str, ...]] = ("anchor", "fisher")
    paper: ClassVar[Paper] = Paper(
        "Recall and Learn: Fine-tuning Deep Pretrained Language Models with Less Forgetting",
        "Chen and Hou and Cui and Che and Liu and Yu",
        2020,
        arxiv="2004.12651",
        venue="EMNLP 2020",
    )

    def __post_init__(self) -> None:
        for what in ("k", "t0", "anchor_strength", "pull", "floor", "anneal_w"):
            if (value := getattr(self, what)) is not None or what not in ("anchor_strength", "pull"):
                number("RecAdam", what, value)
        if self.pull is not None and self.anchor_strength is not None:
            raise ValueError(
                f"RecAdam: pull={self.pull} and anchor_strength={self.anchor_strength} say the same thing twice "
                f"(r = pull = lr * anchor_strength). Give one."
            )
        if self.pull is not None:
            between("RecAdam", "pull", self.pull, 0, 1, "[]", "It is a fraction of the way back.")
        between("RecAdam", "floor", self.floor, 0, 1, "[]")
        if self.t0 < 0 or (self.t0 == 0 and self.anneal == "linear"):
            raise ValueError(f"RecAdam(t0={self.t0}) must be steps above 0, or a fraction of the run between 0 and 1.")
        options = {"lr": 0.0, "eps": 1.0, "weight_decay": 0.0, "betas": (0.9, 0.9), **self._options(1000, 1.0)}
        check_options(options)
        for pattern, overrides in self.groups.items():
            if unknown := sorted(set(overrides) - set(options)):
                known = ", ".join(sorted(options))
                raise ValueError(f"RecAdam: groups[{pattern!r}] has no option {unknown[0]!r}; known are {known}.")
            check_options({**options, **overrides})
        self._check_fisher()

    def _check_fisher(self) -> None:
        one_of("RecAdam", "fisher_kind", self.fisher_kind, ("batch", "sample"))
        if self.fisher_rows is not None:
            whole_number("RecAdam", "fisher_rows", self.fisher_rows)
        if self.fisher is not None and self.pull_every > 1:
            raise ValueError(
                f"RecAdam(pull_every={self.pull_every}) defers one pull for all weights, but with fisher each weight has its own. "
                f"Use pull_every=1."
            )
        # Read now: a wrong path must fail before a model is loaded, not after.
        rows = self.fisher is not None and not str(self.fisher).endswith(SAVED)
        self._rows = load_rows(self.fisher) if rows else None  # pyrefly: ignore[bad-argument-type]

    @classmethod
    def row_sources(cls) -> tuple[str, ...]:
        """The rows that F is measured on."""
        return ("fisher",)

    def replay(self, run: Run) -> None:
        """Tokenise the rows that F is measured on; nothing is mixed into the batches."""
        if self._rows is not None:
            self._measured = run.prepare(self._rows, self.fisher_row_type, self.name)

    def _options(self, updates: int, learning_rate: float) -> dict[str, Any]:
        strength = 5000.0 if self.anchor_strength is None else self.anchor_strength
        return {
            "correct_bias": self.correct_bias,
            "anneal": self.anneal,
            "k": self.k,
            "t0": _update(self.t0, updates),
            "anneal_w": self.anneal_w,
            "anchor_strength": strength if self.pull is None else self.pull / learning_rate,
            "floor": self.floor,
            "out_of_range": self.out_of_range,
            "pull_every": self.pull_every,
        }

    def _group_options(self, overrides: dict[str, Any], updates: int) -> dict[str, Any]:
        """Options of a group; its strength is scaled to give the same pull at its own learning rate."""
        options = dict(overrides)
        if "t0" in options:
            options["t0"] = _update(options["t0"], updates)
        if self.pull is not None and options.get("lr"):
            options.setdefault("anchor_strength", self.pull / options["lr"])
        return options

    def optimizer(self, run: Run) -> OptimizerChoice:
        """RecAdam with the betas, epsilon and weight decay of the training arguments."""
        self._record = None  # a method object may serve a second run with other anchors
        defaults = run.optimizer_defaults()
        if self.pull is not None and defaults["lr"] <= 0:
            raise ValueError(f"RecAdam(pull={self.pull}) is relative to the learning rate, which is {defaults['lr']}.")
        shares = [t0 for t0 in (self.t0, *(g.get("t0", 0) for g in self.groups.values())) if 0 < t0 < 1]
        if shares and not run.max_steps:
            raise ValueError(
                f"RecAdam(t0={shares[0]}) is a fraction of the run, whose length is not known before train()."
            )
        updates = run.max_steps + run.extra_updates if shares else 0
        adam = {key: defaults[key] for key in ("lr", "betas", "eps")}
        groups = tuple((pattern, self._group_options(given, updates)) for pattern, given in self.groups.items())
        return OptimizerChoice(RecAdamOptimizer, {**adam, **self._options(updates, defaults["lr"])}, groups)

    def begin_task(self, run: Run) -> None:
        """Check that something is anchored, and log to what and how strongly."""
        named = self._anchored(run)
        if not named:
            raise ValueError(
                "RecAdam anchors no parameter: every group has anneal_w=0, so it would be plain Adam. Give anneal_w above "
                "0 to at least one group, or drop the method."
            )
        optimizer = self._optimizer(run)
        if self.anchor != "start":
            read_anchors(optimizer, run, named, self.anchor, resumed=self._record is not None)
        if self.fisher is not None and not all("fisher" in optimizer.state[p] for p in named.values()):
            pass_ = None if self._measured is None else (self._measured, self.fisher_kind, self.fisher_rows)
            weigh(optimizer, run, named, str(self.fisher), pass_)
        say(optimizer, named, self.anchor, run.max_steps + run.extra_updates)

    def weights_replaced(self, run: Run) -> None:
        """Drop the pull that `pull_every` has deferred: it was owed to the weights that are gone."""
        for state in self._optimizer(run).state.values():
            state["owed"] = torch.zeros(())

    def end_task(self, run: Run) -> None:
        """Apply the pull that `pull_every` has deferred, if training ended before its last step."""
        self._optimizer(run).apply_owed_pulls()

    def measure(self, run: Run) -> dict[str, Any]:
        """How far the weights are from their anchors."""
        return {"distance": moved(self._optimizer(run), self._anchored(run).values(), run)}

    def logged(self, run: Run) -> dict[str, Any]:
        """The distance from the anchors, which reads weights and anchors once, and the pull r at the logged learning rate."""
        return {**self.measure(run), "pull": pull_now(self._optimizer(run))}

    def state_dict(self, run: Run) -> State:
        """Where the anchors can be read again, or a note that they are stored with the optimizer."""
        optimizer = self._optimizer(run)
        if self._record is not None and "base" in self._record and state_of(self._record["base"]) != self._base_state:
            logger.warning("recadam: %s was overwritten; the anchors are stored from now on.", self._record["base"])
            self._record = {"stored": True}
        if self._record is None:
            named = self._anchored(run)
            anchors = {n: optimizer.state[p]["anchor"] for n, p in named.items() if "anchor" in optimizer.state[p]}
            base = None if run.is_sharded or not anchors else recorded_base(run.model, anchors, run.output_dir)
            self._record = {"stored": True} if base is None else {**base, "fingerprint": fingerprint(anchors)}
            self._base_state = state_of(self._record.get("base") or "")
        optimizer.store_anchors = "stored" in self._record
        return self._record

    def load_state_dict(self, state: State, run: Run) -> None:
        """Read the anchors again if they were not stored, from wherever the same weights are now."""
        self._record = state
        optimizer = self._optimizer(run)
        optimizer.store_anchors = "stored" in state
        named = {n: p for n, p in self._anchored(run).items() if "exp_avg" in optimizer.state.get(p, {})}
        if not named:
            raise ValueError(
                "RecAdam: the checkpoint has no state of the optimizer (optimizer.pt is missing or empty), so its moments "
                "and counters are gone. Copy the file back, resume from another checkpoint, or start a new run from the "
                "weights of this one."
            )
        if "stored" in state:
            return
        asked = ("" if self.anchor == "start" else self.anchor, None)
        anchors, self._record = read_again(state, [asked, base_of(run.model)], named, run.model)
        for name, anchor in anchors.items():
            optimizer.state[named[name]]["anchor"] = anchor
        self._base_state = state_of(self._record["base"])

    def _optimizer(self, run: Run) -> RecAdamOptimizer:
        if not isinstance(run.optimizer, RecAdamOptimizer):
            raise TypeError(f"RecAdam needs its own optimizer, and the run has a {type(run.optimizer).__name__}.")
        return run.optimizer

    def _anchored(self, run: Run) -> dict[str, torch.nn.Parameter]:
        members = {id(p) for g in self._optimizer(run).param_groups if g["anneal_w"] > 0 for p in g["params"]}
        return {name: p for name, p in run.named_parameters().items() if id(p) in members}


def _update(t0: float, updates: int) -> float:
    """The update that t0 means in a run of `updates` updates."""
    return t0 * updates if 0 < t0 < 1 else t0
