r"""GeRe: replay general samples, and hold them to their recorded activation states.

Zhang et al., "GeRe: Towards Efficient Anti-Forgetting in Continual Learning of LLM via General Samples Replay", 2025,
https://arxiv.org/abs/2508.04676.

K fixed general texts are passed once through the reference model; the last hidden state h of every token gives, per
channel d, mean and deviation over all tokens, thresholds low_d, high_d = mu_d -+ sigma_d, and a state s in {-1, 0, +1} per
unit (`activation_states`). In training the texts are mixed in, and every unit that left the interval of its state is
pulled back (`tm_loss`):

    L = 1/2 (CE_general + CE_task) + w TM        in micro-batches that hold both; CE is the mean over each.

w is fixed ("100" in the paper) or "dynamic": CE / TM of the micro-batch, without gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor

from hf_continual.bounds import at_least, one_of, whole_number
from hf_continual.data.recording import DIGITS, key_of
from hf_continual.data.replay import ReplayRows
from hf_continual.data.rows import load_rows
from hf_continual.data.self_generated import kept_texts, own_words
from hf_continual.methods.base import AddedRows, Forward, Method, Run
from hf_continual.methods.base_pass import weights_of_first
from hf_continual.methods.gere import base_states
from hf_continual.methods.gere.general_rows import general_tokens
from hf_continual.methods.gere.margin import Reduction, margin, reduced
from hf_continual.methods.gere.states import States, record
from hf_continual.methods.gere.ternary import unpack_states
from hf_continual.paper import Paper
from hf_continual.tensors.head import head_tensors
from hf_continual.tensors.imitation import imitation, logit_divergence, mixed_ce
from hf_continual.tensors.reference import as_reference, check_head, last_hidden, most_tokens, numerics

Constraint = Literal["tm", "none", "l1", "l2", "kl"]

MOST_WEIGHT = 1e4  # limit of the dynamic weight, which is unbounded as TM goes to 0


@dataclass
class GeRe(Method):
    """Replay general samples and keep their hidden units on the same side of the thresholds.

    Idea: forgetting shows in how a model represents ordinary text. A fixed set is replayed, and its last hidden states
    may move freely between thresholds but not across them.
    Hooks: rows, loss terms. Cost: one pass over the samples before the first task, 2 bits per unit on disk (a 16th of
    fp32), and in training one byte per replayed unit until backward.
    Relations: `constraint="none"` is the paper's BaselineR; `Replay` of general text is the same with a different mix
    of the losses. Composes with everything.
    Differs from the authors' code: one forward pass for task and general rows (equal to 1e-5), stable statistics, states
    instead of fp32 files, a keyed cache; a channel with zero deviation counts once.

    Args:
        rows: General text: a dataset, a list of ``{"text": ...}``, a file or a Hub id; or ``"self"``: the reference
            model writes them. The paper uses 1,000 rows of SlimPajama.
        per_batch: General rows added to each micro-batch of each process.
        ratio: Instead of `per_batch`: fraction of the tokens of the mix, strictly between 0 and 1.
        weight: w, or ``"dynamic"``: the micro-batch's CE / TM, at most 1e4.
        constraint: ``"tm"``; ``"none"``; ``"l1"``/``"l2"`` imitation of hidden states; ``"kl"`` of the logits.
        reduction: Divisor of TM: violated units (the paper), all units (``"entries"``) or ``"tokens"``.
        ce_mix: ``"official"``, or ``"tokens"``: a general token counts as `ce_weight` task tokens in one mean, which
            does not depend on how rows are split into micro-batches.
        ce_weight: Weight of a general token under ``ce_mix="tokens"``.
        reference: Model that the states are recorded from: ``"base"``, or the model at ``"task_start"``.
        num_samples: K, the number of rows to use, the first ones.
        max_length: Tokens to use of a row, from its beginning; fewer if the model or the trainer takes fewer.
        threshold: Distance of the thresholds from the mean, in standard deviations.
        dead_band: Distances below it, such as from rounding, are not violations.
        cache_dir: Folder of recorded states; runs with the same rows and base share them.
        name: Prefix of the logged values.

    Raises:
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If one is out of range, or no row has two tokens.
    """

    rows: Dataset | str | list[dict[str, Any]]
    per_batch: int | None = None
    ratio: float | None = None
    weight: float | Literal["dynamic"] = 100.0
    constraint: Constraint = "tm"
    reduction: Reduction = "violations"
    ce_mix: Literal["official", "tokens"] = "official"
    ce_weight: float = 1.0
    reference: Literal["base", "task_start"] = "base"
    num_samples: int = 1000
    max_length: int = 563
    threshold: float = 1.0
    dead_band: float = 0.0
    cache_dir: str = "~/.cache/hf_continual/gere"
    name: str = "gere"  # pyrefly: ignore[bad-override]

    taps: ClassVar[tuple[str, ...]] = ("last_hidden_state",)
    general_text: ClassVar[bool] = True
    places: ClassVar[tuple[str, ...]] = ("rows", "cache_dir")
    state_with_model: ClassVar[bool] = True
    leaves: ClassVar[str] = (
        "which base the weights come from, and with full weights the base's states of the general rows"
    )
    droppable: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "GeRe: Towards Efficient Anti-Forgetting in Continual Learning of LLM via General Samples Replay",
        "Zhang et al.",
        2025,
        arxiv="2508.04676",
    )
    _texts: list[str] | None = field(default=None, init=False, repr=False, compare=False)
    _tokens: list[list[int]] = field(default_factory=list, init=False, repr=False, compare=False)
    _left: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    _recorded: States | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        choices = {
            "constraint": ("tm", "none", "l1", "l2", "kl"), "reduction": ("violations", "entries", "tokens"),
            "ce_mix": ("official", "tokens"), "reference": ("base", "task_start"),
        }  # fmt: skip
        for key, known in choices.items():
            one_of("GeRe", key, getattr(self, key), known)
        if (self.ratio is None) == (self.per_batch is None):
            raise ValueError(
                f"GeRe needs either per_batch (rows per micro-batch) or ratio (fraction of tokens), got "
                f"per_batch={self.per_batch!r} and ratio={self.ratio!r}."
            )
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ValueError(f"GeRe(ratio={self.ratio!r}) must lie strictly between 0 and 1: a fraction of the tokens.")
        if self.per_batch is not None:
            whole_number("GeRe", "per_batch", self.per_batch)
        if self.weight != "dynamic":
            at_least("GeRe", "weight", self.weight, 0)
        for key in ("ce_weight", "dead_band", "threshold"):
            at_least("GeRe", key, getattr(self, key), 0)
        for key, least in (("num_samples", 1), ("max_length", 2)):
            whole_number("GeRe", key, getattr(self, key), least)
        if self.ce_mix == "official" and self.ce_weight != 1:
            raise ValueError('GeRe(ce_weight=...) belongs to ce_mix="tokens"; the official mix has no weights.')
        if self.rows != "self":
            # Read now: a wrong path must fail before a model is loaded, not after.
            rows = load_rows(self.rows)
            if "text" not in rows.column_names:
                raise ValueError(f"GeRe needs rows with a column 'text'; these have {rows.column_names}.")
            self._texts = rows["text"][: self.num_samples]
        self._constrained = self.constraint != "none" and self.weight != 0

    def reads_forward(self) -> bool:
        """False only for plain mixing by tokens without a constraint, which needs no term."""
        return self.ce_mix == "official" or self._constrained

    def reads_reference(self) -> bool:
        """Always: states, and self-written texts, come from the weights before training."""
        return self.rows == "self" or self._constrained

    def needs_earlier_task(self) -> bool:
        """The states are those of the base model: they hold from the first task on."""
        return False

    def added_rows(self) -> AddedRows:
        """The ratio or number of general rows."""
        return AddedRows(self.ratio, self.per_batch, float(self.ce_weight), self.max_length)

    def makes_rows(self) -> bool:
        """Self-written texts are generated in `prepare`."""
        return self.rows == "self"

    def replay(self, run: Run) -> ReplayRows | None:
        """The tokenised texts, once they exist."""
        if self._texts is None:
            return None
        self._tokens = general_tokens(self._texts, run.tokenizer, self.max_length, most_tokens(run.model))
        # States belong to the beginning of a row: truncate here, or the trainer might cut the other end.
        rows = Dataset.from_list(
            [{"input_ids": ids, "labels": ids} for ids in (t[: run.max_length] for t in self._tokens)]
        )
        return ReplayRows(rows, self.ratio, self.per_batch, float(self.ce_weight), "tokenized")

    def load_task_state(self, state: dict[str, Any], run: Run) -> None:
        """Load which base the weights come from, and its states."""
        self._left = state

    def prepare(self, run: Run) -> None:
        """Record the states of the texts in one pass, while the weights are still those the task starts from."""
        if self._recorded is not None:
            return  # a second call of train: the weights have moved since
        if self.rows == "self":
            self._texts = self._own_texts(run)
            self.replay(run)
        if not self._constrained:
            return
        if self.constraint == "kl":
            with run.autocast():
                check_head(run.model, self.reference, self._tokens[0], run.is_sharded)
        self._recorded = self._record(run, self._tokens)

    def _own_texts(self, run: Run) -> list[str]:
        numbers = {"number": self.num_samples, "length": self.max_length, "seed": run.seed, "version": 2}
        stem = f"own-words-{key_of({**numbers, **numerics(run.model, run.tokenizer)})}"
        weights = weights_of_first(run, "base")[0]
        base = self._base = base_states.base_of(run, self._left, weights)
        file = Path(self.cache_dir).expanduser() / f"{stem}-{base[:DIGITS]}.jsonl"

        def write() -> list[str]:
            with as_reference(run.model, "base"), run.autocast():
                return own_words(run.model, run.tokenizer, self.num_samples, self.max_length, run.seed)

        return kept_texts(file, self.num_samples, write if base == weights else None)

    def _record(self, run: Run, tokens: Sequence[Sequence[int]]) -> States:
        keep, head = self.constraint != "tm", self.constraint == "kl"
        facts = base_states.facts_for(
            run, tokens, self.reference, keep, head, max_length=self.max_length, threshold=self.threshold
        )
        weights, able = weights_of_first(run, self.reference)
        base = self._base = base_states.base_of(run, self._left, weights) if self.reference == "base" else weights
        file = Path(self.cache_dir).expanduser() / f"{key_of(facts)}-{base[:DIGITS]}.safetensors"
        facts["weights"] = base
        if base != weights:
            return base_states.recorded_before(file, facts, self._left)
        with as_reference(run.model, self.reference), run.autocast():
            hidden, extra = partial(last_hidden, run.model), partial(head_tensors, run.model) if head else dict
            return record(file, facts, tokens, hidden, self.threshold, keep, extra, able)

    def task_state(self, run: Run) -> dict[str, Any]:
        """The base that the weights come from; with full weights also its states, which can no longer be recorded.

        States take 2 bits per unit. Hidden states, 16 times as large, stay in the cache, and so do self-written texts.
        """
        if self.reference != "base" or not self.reads_reference():
            return {}
        goes_along = self._recorded is not None and self.constraint == "tm" and not isinstance(run.model, PeftModel)
        return base_states.left_for(self._base, self._recorded if goes_along else None)

    def state_dict(self, run: Run) -> dict[str, Tensor]:
        """The thresholds: a resumed run must use those of the weights that the run began with."""
        return {} if self._recorded is None else {name: self._recorded.tensor(name) for name in ("low", "high")}

    def load_state_dict(self, state: dict[str, Tensor], run: Run) -> None:
        """Refuse states that were recorded from different weights."""
        if self._recorded is None or not state:
            return
        base_states.check_same_states(self._recorded, state)

    def begin_task(self, run: Run) -> None:
        """Move the thresholds to the device; find the LM head that the KL term needs."""
        if self._recorded is not None:
            self._low_D, self._high_D = (t.to(run.device) for t in (self._recorded.low_D, self._recorded.high_D))
        if self.constraint == "kl" and self._recorded is not None:
            self._head, self._reference_head = base_states.heads(run, self._recorded)

    def loss_terms(self, forward: Forward) -> dict[str, Tensor]:
        """The terms for the mix of the losses and for the constraint."""
        terms: dict[str, Tensor] = {}
        loss_BS = forward.token_loss_BS
        general, task = forward.label_mask(self.name), forward.label_mask()
        if self.ce_mix == "official":
            # Other sources keep their place in the token mean; only task and general rows are reweighted.
            both = general | task
            terms["mix"] = mixed_ce(loss_BS, general, task) - forward.token_mean(loss_BS * both)
        drawn = [(row, length) for source, row, length in forward.drawn if forward.sources[source] == self.name]
        if self._recorded is None:
            return terms
        if not drawn:  # logged anyway: processes sum their logs name by name
            for name in (self.constraint, "weight", *(["violations"] if self.constraint == "tm" else [])):
                forward.note(name, loss_BS.new_zeros(()), 0.0)
            return {**terms, "constraint": loss_BS.new_zeros(())}
        value = self._constraint(forward, self._recorded, drawn)
        weight: Any = self.weight
        if weight == "dynamic":
            ce = mixed_ce(loss_BS.detach(), general, task)
            weight = (ce / (value.detach() + 1e-8)).clamp(max=MOST_WEIGHT)
        forward.note(self.constraint, value)
        # Without a violation there is nothing to weigh: CE divided by zero would reach the limit.
        counted = (value.detach() > 0).float() if self.weight == "dynamic" else 1.0
        forward.note("weight", weight * counted, counted)
        terms["constraint"] = weight * value
        return terms

    def _constraint(self, forward: Forward, recorded: States, drawn: Sequence[tuple[int, int]]) -> Tensor:
        """Distance of a micro-batch's general rows from their recorded values."""
        hidden_TD, kept = base_states.side_by_side(forward, self.name, recorded, drawn, self.constraint == "tm")
        if self.constraint == "kl":
            return logit_divergence(hidden_TD, kept, self._head, self._reference_head)
        if self.constraint != "tm":
            return imitation(hidden_TD, kept, "l1" if self.constraint == "l1" else "l2")
        tokens, channels = hidden_TD.shape
        ones = torch.ones(tokens, device=hidden_TD.device)
        states = unpack_states(kept, channels)
        total, count = margin(hidden_TD, states, self._low_D, self._high_D, ones, self.dead_band)
        forward.note("violations", count, tokens * channels)
        return reduced(total, count, tokens, channels, self.reduction)
