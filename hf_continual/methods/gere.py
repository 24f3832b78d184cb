r"""GeRe: general samples replayed, and held to their recorded activation states.

Zhang et al., "GeRe: Towards Efficient Anti-Forgetting in Continual Learning of LLM via General Samples Replay", 2025,
https://arxiv.org/abs/2508.04676.

K fixed general texts are passed once through the reference model; the last hidden state h of every token gives, per
channel d, mean and deviation over all tokens, thresholds low_d, high_d = mu_d -+ sigma_d, and a state s in {-1, 0, +1} per
unit (`activation_states`). In training the texts are mixed in, and every unit that has left the interval of its state is
pulled back (`tm_loss`):

    L = 1/2 (CE_general + CE_task) + w TM        in micro-batches that hold both, with the means over each.

w is fixed ("100" in the paper) or "dynamic": CE / TM of the micro-batch, without gradient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor

from hf_continual.data.general_rows import general_tokens
from hf_continual.data.lineage import DIGITS, facts_of, kept_of_base, remember
from hf_continual.data.own_words import kept_texts, own_words
from hf_continual.data.replay import ReplayRows
from hf_continual.data.rows import load_rows
from hf_continual.data.states import Recorded, key_of, open_recorded, open_whole, record
from hf_continual.data.together import from_first, gathered
from hf_continual.methods.base import Forward, Method, Run
from hf_continual.methods.bounds import at_least, one_of, whole_number
from hf_continual.paper import Paper
from hf_continual.tensors.head import finish_of, head_bias, head_tensors, logits_function, recorded_logits
from hf_continual.tensors.imitation import imitation, logit_divergence, mixed_ce
from hf_continual.tensors.margin import Reduction, margin, reduced, tm_loss
from hf_continual.tensors.reference import (
    Reference,
    as_reference,
    check_head,
    last_hidden,
    most_tokens,
    numerics,
    untrained,
    virtual_tokens,
    weights_fingerprint,
)
from hf_continual.tensors.ternary import activation_states, hidden_statistics, unpack_states

__all__ = ["GeRe", "activation_states", "hidden_statistics", "imitation", "mixed_ce", "tm_loss"]

Constraint = Literal["tm", "none", "l1", "l2", "kl"]

MOST_WEIGHT = 1e4  # of the dynamic weight, which has no limit as TM goes to 0


@dataclass
class GeRe(Method):
    """Replay general samples and keep their hidden units on the side of the thresholds where they were.

    Idea: forgetting shows in how a model sees ordinary text. A fixed set of it is replayed, and its last hidden states
    may move freely between thresholds but not across them.
    Stations: rows, loss terms. Cost: one pass over the samples before the first task, 2 bits per unit on disk (a 16th of
    fp32), and in training one byte per replayed unit until backward.
    Relations: `constraint="none"` is the paper's BaselineR; `Replay` of general text is the same with another mix of the
    losses. Composes with everything.
    Differs from the authors' code: one forward pass for task and general rows (equal to 1e-5), stable statistics, states
    instead of fp32 files, a cache with a key; a channel without deviation counts once.

    Args:
        rows: General text: a dataset, a list of ``{"text": ...}``, a file or a Hub id; or ``"self"``: the reference
            model writes them. The paper uses 1,000 rows of SlimPajama.
        per_batch: General rows added to each micro-batch of each process.
        ratio: Instead: share of the tokens of the mix, strictly between 0 and 1.
        weight: w, or ``"dynamic"``: the micro-batch's CE / TM, at most 1e4.
        constraint: ``"tm"``; ``"none"``; ``"l1"``/``"l2"`` imitation of hidden states; ``"kl"`` of the logits.
        reduction: What TM is divided by: violated units (the paper), all units (``"entries"``) or ``"tokens"``.
        ce_mix: ``"official"``, or ``"tokens"``: a general token counts `ce_weight` task tokens in one mean, which does
            not depend on how rows fall into micro-batches.
        ce_weight: Weight of a general token under ``ce_mix="tokens"``.
        reference: Model that the states are from: ``"base"``, or the model at ``"task_start"``.
        num_samples: K, the first rows that are used.
        max_length: Tokens of a row that are used, from its beginning; fewer where the model or the trainer takes fewer.
        threshold: Distance of the thresholds from the mean, in standard deviations.
        dead_band: Distances below it count as no violation: what rounding alone moves.
        cache_dir: Where recorded states are kept; tasks of a sequence must share it.
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
    places: ClassVar[tuple[str, ...]] = ("rows", "cache_dir")
    state_with_model: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "GeRe: Towards Efficient Anti-Forgetting in Continual Learning of LLM via General Samples Replay",
        "Zhang et al.",
        2025,
        arxiv="2508.04676",
    )
    _recorded: Recorded | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        choices = {
            "constraint": ("tm", "none", "l1", "l2", "kl"), "reduction": ("violations", "entries", "tokens"),
            "ce_mix": ("official", "tokens"), "reference": ("base", "task_start"),
        }  # fmt: skip
        for key, known in choices.items():
            one_of("GeRe", key, getattr(self, key), known)
        if (self.ratio is None) == (self.per_batch is None):
            raise ValueError(
                f"GeRe needs either per_batch (rows per micro-batch) or ratio (share of tokens), got "
                f"per_batch={self.per_batch!r} and ratio={self.ratio!r}."
            )
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ValueError(f"GeRe(ratio={self.ratio!r}) must lie strictly between 0 and 1: a share of the tokens.")
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
            # Reading now: a wrong path must fail before a model is loaded, not after.
            self._rows = load_rows(self.rows)
            if "text" not in self._rows.column_names:
                raise ValueError(f"GeRe needs rows with a column 'text', these have {self._rows.column_names}.")
        self._constrained = self.constraint != "none" and self.weight != 0

    def reads_forward(self) -> bool:
        """Plain mixing by tokens without a constraint needs no term."""
        return self.ce_mix == "official" or self._constrained

    def reads_reference(self) -> bool:
        """The states are those of the weights before training; so are texts of its own."""
        return self.rows == "self" or self._constrained

    def replay(self, run: Run) -> ReplayRows:
        """The texts as tokens; their states are recorded here, while the weights are those the task begins with."""
        texts = self._own_texts(run) if self.rows == "self" else self._rows["text"][: self.num_samples]
        tokens = general_tokens(texts, run.tokenizer, self.max_length, most_tokens(run.model))
        # States belong to the beginning of a row: cut here, lest the trainer cuts at the other end.
        rows = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in (t[: run.max_length] for t in tokens)])
        if self._constrained and self.constraint == "kl":
            with run.autocast():
                check_head(run.model, self.reference, tokens[0], run.is_sharded)
        self._recorded = self._record(run, tokens) if self._constrained else None
        return ReplayRows(rows, self.ratio, self.per_batch, float(self.ce_weight), "tokenized")

    def _weights(self, run: Run, reference: Reference) -> tuple[str, bool]:
        """Fingerprint of process 0's weights, and whether this process holds the same."""
        own = weights_fingerprint(run.model, reference)
        first = gathered(own)[0]
        return first, own == first

    def _own_texts(self, run: Run) -> list[str]:
        numbers = {"number": self.num_samples, "length": self.max_length, "seed": run.seed, "version": 2}
        stem = f"own-words-{key_of({**numbers, **numerics(run.model, run.tokenizer)})}"
        folder, weights = Path(self.cache_dir).expanduser(), self._weights(run, "base")[0]
        moved = run.task.index > 0 and untrained(run.model)
        file, here = from_first(lambda: kept_of_base(folder, stem, ".jsonl", weights, moved))

        def write() -> list[str]:
            with as_reference(run.model, "base"), run.autocast():
                return own_words(run.model, run.tokenizer, self.num_samples, self.max_length, run.seed)

        return kept_texts(file, self.num_samples, None if here is None else write)

    def _record(self, run: Run, tokens: Sequence[Sequence[int]]) -> Recorded:
        keep = self.constraint != "tm"
        facts: dict[str, Any] = {
            "texts": hashlib.sha256(repr(tokens).encode()).hexdigest(),
            "max_length": self.max_length, "threshold": self.threshold, "what": "hidden" if keep else "states",
            "head": self.constraint == "kl", "layer": "last_hidden_state", "version": 2, "autocast": run.autocast_dtype,
            **numerics(run.model, run.tokenizer),
        }  # fmt: skip
        if self.constraint == "kl" and head_bias(run.model) is not None:
            facts["head_bias"] = True
        if self.reference == "task_start" and (virtual := virtual_tokens(run.model)):
            facts["virtual_tokens"] = virtual
        folder, (weights, able) = Path(self.cache_dir).expanduser(), self._weights(run, self.reference)
        file, base = folder / f"{key_of(facts)}-{weights[:DIGITS]}.safetensors", weights
        if self.reference == "base":
            moved = run.task.index > 0 and untrained(run.model)
            file, base = from_first(lambda: kept_of_base(folder, key_of(facts), ".safetensors", weights, moved))
        self._base = facts["weights"] = base or str(facts_of(file).get("weights"))
        if base is None:
            if from_first(lambda: open_recorded(file, facts)) is None:
                raise ValueError(f"GeRe: {file} is damaged and the base weights are gone. Begin with the first task.")
            return open_whole(file)
        with as_reference(run.model, self.reference), run.autocast():
            hidden, head = partial(last_hidden, run.model), partial(head_tensors, run.model)
            extra = head if self.constraint == "kl" else dict
            return record(file, facts, tokens, hidden, self.threshold, keep, extra, able)

    def end_task(self, run: Run) -> None:
        """The next task begins with the weights of now: which base they come from is noted."""
        if self._recorded is None or self.reference != "base" or run.is_sharded or isinstance(run.model, PeftModel):
            return
        folder, now = Path(self.cache_dir).expanduser(), weights_fingerprint(run.model, "base")
        from_first(lambda: remember(folder, now, self._base))

    def state_dict(self, run: Run) -> dict[str, Tensor]:
        """The thresholds: a resumed run must have those of the weights that the run began with."""
        return {} if self._recorded is None else {"low": self._recorded.low_D, "high": self._recorded.high_D}

    def load_state_dict(self, state: dict[str, Tensor], run: Run) -> None:
        """Refuse states that were recorded from other weights."""
        if self._recorded is None or not state:
            return
        width = (state["high"] - state["low"]).abs() + 1e-6
        if float(((self._recorded.low_D - state["low"]).abs() / width).max()) > 1e-3:
            raise ValueError(
                f"GeRe: {self._recorded.file} holds states of other weights than those that the run to be resumed began with. "
                f"Build the trainer with the same model as then, not with a checkpoint of it."
            )

    def begin_task(self, run: Run) -> None:
        """What is compared with on the device, and where the head is that the KL needs."""
        if self._recorded is not None:
            self._low_D, self._high_D = (t.to(run.device) for t in (self._recorded.low_D, self._recorded.high_D))
        if self.constraint == "kl" and self._recorded is not None:
            names = ["head"] if head_bias(run.model) is None else ["head", "head_bias"]
            self._head = logits_function(run.model)
            self._reference_head = recorded_logits(
                *(self._recorded.tensor(name).to(run.device) for name in names), finish=finish_of(run.model)
            )

    def loss_terms(self, forward: Forward) -> dict[str, Tensor]:
        """The mix of the losses, and the constraint."""
        terms: dict[str, Tensor] = {}
        loss_BS = forward.token_loss_BS
        general, task = forward.label_mask(self.name), forward.label_mask()
        if self.ce_mix == "official":
            # Other sources keep their place in the token mean; only task and general rows are mixed anew.
            both = general | task
            terms["mix"] = mixed_ce(loss_BS, general, task) - forward.token_mean(loss_BS * both)
        drawn = [(row, length) for source, row, length in forward.drawn if forward.sources[source] == self.name]
        if self._recorded is None:
            return terms
        if not drawn:  # entered all the same: processes add up their logs name by name
            for name in (self.constraint, "weight", *(["violations"] if self.constraint == "tm" else [])):
                forward.note(name, loss_BS.new_zeros(()), 0.0)
            return {**terms, "constraint": loss_BS.new_zeros(())}
        tokens = sum(length for _, length in drawn)
        hidden_BSD = forward.taps["last_hidden_state"]
        where = torch.nonzero_static(forward.mask(self.name).flatten(), size=tokens).squeeze(1)
        hidden_TD = hidden_BSD.flatten(0, 1).index_select(0, where)
        what = "states" if self.constraint == "tm" else "hidden"
        kept = torch.cat([self._recorded.row(row, length, what) for row, length in drawn])
        kept = kept.to(hidden_TD.device, non_blocking=True)
        if self.constraint == "kl":
            value = logit_divergence(hidden_TD, kept, self._head, self._reference_head)
        elif self.constraint != "tm":
            value = imitation(hidden_TD, kept, "l1" if self.constraint == "l1" else "l2")
        else:
            channels = hidden_TD.shape[1]
            states = unpack_states(kept, channels)
            ones = torch.ones(tokens, device=hidden_TD.device)
            total, count = margin(hidden_TD, states, self._low_D, self._high_D, ones, self.dead_band)
            value = reduced(total, count, tokens, channels, self.reduction)
            forward.note("violations", count, tokens * channels)
        weight: Any = self.weight
        if weight == "dynamic":
            ce = mixed_ce(loss_BS.detach(), general, task)
            weight = (ce / (value.detach() + 1e-8)).clamp(max=MOST_WEIGHT)
        forward.note(self.constraint, value)
        # A weight that multiplies nothing is none: CE over no violation would be the largest there is.
        counted = (value.detach() > 0).float() if self.weight == "dynamic" else 1.0
        forward.note("weight", weight * counted, counted)
        terms["constraint"] = weight * value
        return terms
