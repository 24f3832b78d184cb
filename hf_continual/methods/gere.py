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
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_continual.data.own_words import own_words
from hf_continual.data.replay import ReplayRows
from hf_continual.data.rows import load_rows
from hf_continual.data.states import Recorded, key_of, open_recorded, record
from hf_continual.durable import read_lines, write_lines
from hf_continual.methods.base import Forward, Method, Run
from hf_continual.paper import Paper
from hf_continual.tensors.imitation import imitation, logit_divergence, mixed_ce
from hf_continual.tensors.margin import Reduction, margin, reduced, tm_loss
from hf_continual.tensors.reference import as_reference, last_hidden, numerics, weights_fingerprint
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
        max_length: Tokens of a row that are used.
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
            if getattr(self, key) not in known:
                raise ValueError(f"GeRe({key}={getattr(self, key)!r}) must be one of {', '.join(known)}.")
        if (self.ratio is None) == (self.per_batch is None):
            raise ValueError(
                f"GeRe needs either per_batch (rows per micro-batch) or ratio (share of tokens), got "
                f"per_batch={self.per_batch!r} and ratio={self.ratio!r}."
            )
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ValueError(f"GeRe(ratio={self.ratio!r}) must lie strictly between 0 and 1: a share of the tokens.")
        if self.per_batch is not None and (isinstance(self.per_batch, bool) or self.per_batch < 1):
            raise ValueError(f"GeRe(per_batch={self.per_batch!r}) must be at least 1 row.")
        if self.weight != "dynamic":
            _at_least("weight", self.weight, 0)
        for key, least in (("ce_weight", 0), ("dead_band", 0), ("threshold", 0), ("num_samples", 1), ("max_length", 2)):
            _at_least(key, getattr(self, key), least)
        if self.ce_mix == "official" and self.ce_weight != 1:
            raise ValueError('GeRe(ce_weight=...) belongs to ce_mix="tokens"; the official mix has no weights.')
        if self.rows != "self":
            # Reading now: a wrong path must fail before a model is loaded, not after.
            self._rows = load_rows(self.rows)
            if "text" not in self._rows.column_names:
                raise ValueError(f"GeRe needs rows with a column 'text', these have {self._rows.column_names}.")

    def reads_forward(self) -> bool:
        """Plain mixing by tokens without a constraint needs no term."""
        return self.ce_mix == "official" or (self.constraint != "none" and self.weight != 0)

    def replay(self, run: Run) -> ReplayRows:
        """The texts as tokens; their states are recorded here, while the weights are those the task begins with."""
        tokens = [ids for ids in self._tokens(run) if len(ids) > 1]
        if not tokens:
            raise ValueError(
                "GeRe: none of the general rows has two tokens, so nothing can be predicted. Give longer texts."
            )
        rows = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in tokens])
        if self.constraint != "none" and self.weight != 0:
            self._recorded = self._record(run, tokens)
        else:
            self._recorded = None
        weight = self.ce_weight if self.ce_mix == "tokens" else 1.0
        return ReplayRows(rows, self.ratio, self.per_batch, float(weight), "tokenized")

    def _tokens(self, run: Run) -> list[list[int]]:
        texts = self._own_texts(run) if self.rows == "self" else self._rows["text"][: self.num_samples]
        return [ids[: self.max_length] for ids in run.tokenizer(texts, add_special_tokens=False)["input_ids"]]  # pyrefly: ignore

    def _own_texts(self, run: Run) -> list[str]:
        facts = {
            "weights": weights_fingerprint(run.model, "base"),
            "number": self.num_samples,
            "length": self.max_length,
            "seed": run.seed,
        }
        file = Path(self.cache_dir).expanduser() / f"own-words-{key_of(facts)}.jsonl"
        if not file.is_file():
            with as_reference(run.model, "base"), run.autocast():
                texts = own_words(run.model, run.tokenizer, self.num_samples, self.max_length, run.seed)
            write_lines(file, [{"text": text} for text in texts])
        return [row["text"] for row in read_lines(file)]

    def _record(self, run: Run, tokens: Sequence[Sequence[int]]) -> Recorded:
        keep = self.constraint != "tm"
        facts: dict[str, Any] = {
            "texts": hashlib.sha256(repr(tokens).encode()).hexdigest(),
            "max_length": self.max_length, "threshold": self.threshold, "what": "hidden" if keep else "states",
            "head": self.constraint == "kl", "layer": "last_hidden_state", "version": 1, "autocast": run.autocast_dtype, **numerics(run.model, run.tokenizer),
        }  # fmt: skip
        folder = Path(self.cache_dir).expanduser()
        # A later task finds the first one's file by everything but the weights, which may be gone by then.
        weights = weights_fingerprint(run.model, self.reference)
        file = folder / f"{key_of(facts)}-{weights[:16]}.safetensors"
        if self.reference == "base" and run.task.index > 0 and not file.is_file():
            others = sorted(folder.glob(f"{key_of(facts)}-*.safetensors"))
            if others or not _has_adapter(run.model):
                return self._from_first_task(others, facts, run)
        facts["weights"] = weights

        def head() -> dict[str, Tensor]:
            weight: Any = run.model.get_output_embeddings().weight  # pyrefly: ignore[not-callable]
            return {"head": weight.detach().to(torch.bfloat16).cpu().clone()} if self.constraint == "kl" else {}

        with as_reference(run.model, self.reference), run.autocast():
            return record(file, facts, tokens, partial(last_hidden, run.model), self.threshold, keep, head)

    def _from_first_task(self, files: Sequence[Path], facts: dict[str, Any], run: Run) -> Recorded:
        """The file of the sequence's first task: the weights have moved on, the reference is no longer here."""
        if len(files) != 1:
            raise ValueError(
                f"GeRe(reference='base'): task {run.task.index} begins with fine-tuned weights, and {self.cache_dir} holds "
                f"{len(files)} files of recorded states for these rows and this model, not one. Run the first task with the "
                f"same cache_dir, or say reference='task_start'."
            )
        with_weights = {**facts, "weights": _recorded_weights(files[0])}
        found = open_recorded(files[0], with_weights)
        if found is None:
            raise ValueError(
                f"GeRe: {files[0]} is damaged and the base weights are gone. Record it again from the base model."
            )
        return found

    def begin_task(self, run: Run) -> None:
        """Where the head is that the KL needs."""
        if self.constraint == "kl" and self._recorded is not None:
            if run.is_sharded:
                raise ValueError(
                    "GeRe(constraint='kl') needs the whole language-model head; under FSDP use 'tm', 'l1' or 'l2'."
                )
            self._head: Any = run.model.get_output_embeddings()  # pyrefly: ignore[not-callable]
            self._reference_head = self._recorded.tensor("head").to(run.device)

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
        if self._recorded is None or not drawn:
            return terms
        tokens = sum(length for _, length in drawn)
        hidden_BSD = forward.taps["last_hidden_state"]
        where = torch.nonzero_static(forward.mask(self.name).flatten(), size=tokens).squeeze(1)
        hidden_TD = hidden_BSD.flatten(0, 1).index_select(0, where)
        what = "states" if self.constraint == "tm" else "hidden"
        kept = torch.cat([self._recorded.row(row, length, what) for row, length in drawn])
        kept = kept.to(hidden_TD.device, non_blocking=True)
        if self.constraint != "tm":
            value = self._imitation(hidden_TD, kept)
        else:
            low, high = (t.to(hidden_TD.device) for t in (self._recorded.low_D, self._recorded.high_D))
            channels = hidden_TD.shape[1]
            states = unpack_states(kept, channels)
            ones = torch.ones(tokens, device=hidden_TD.device)
            total, count = margin(hidden_TD, states, low, high, ones, self.dead_band)
            value = reduced(total, count, tokens, channels, self.reduction)
            forward.note("violations", count, tokens * channels)
        weight: Any = self.weight
        if weight == "dynamic":
            ce = mixed_ce(loss_BS.detach(), general, task)
            weight = (ce / (value.detach() + 1e-8)).clamp(max=MOST_WEIGHT)
        forward.note(self.constraint, value)
        forward.note("weight", torch.as_tensor(weight, dtype=torch.float32, device=value.device))
        terms["constraint"] = weight * value
        return terms

    def _imitation(self, hidden_TD: Tensor, reference_TD: Tensor) -> Tensor:
        if self.constraint == "kl":
            return logit_divergence(hidden_TD, reference_TD, self._head, self._reference_head)
        return imitation(hidden_TD, reference_TD, "l1" if self.constraint == "l1" else "l2")


def _has_adapter(model: Any) -> bool:
    return isinstance(model, PeftModel)


def _recorded_weights(file: Path) -> str | None:
    try:
        with safe_open(file, "pt") as opened:
            return json.loads((opened.metadata() or {})["facts"])["weights"]
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def _at_least(key: str, value: Any, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"GeRe({key}={value!r}) must be a number, got {type(value).__name__}.")
    if not least <= value < float("inf"):
        raise ValueError(f"GeRe({key}={value!r}) must be a finite number of at least {least}.")
