r"""A KL to the base model, and ASFT and DFT.

Zhu et al., "Anchored Supervised Fine-Tuning", 2025, https://arxiv.org/abs/2509.23753 (ASFT); without the KL it is DFT, Wu et
al., "On the Generalization of SFT", 2025, https://arxiv.org/abs/2508.05629. With p_t the probability of the token, taken
without gradient as a weight (``weighting="probability"``), and p_base the base's prediction:

    L = 1/N sum_t [ p_t (-log p_t) + weight KL(p_base || p) at t ]

``weighting="none"`` leaves the first term as it is: fine-tuning with a forward KL, which holds what the model says at the
task's own tokens to what the base says there. With `rows` the sum of the KL is over the tokens of these replayed rows instead.

N is the number of loss tokens of the whole step, as in the plain loss, so nothing depends on accumulation or processes.

Where the base's predictions come from:

* ``source="recorded"``: one pass of the base before training keeps its `top_k` likeliest tokens at each trained token, 8 top_k
  + 4 bytes each, and the probability of all others together as one outcome. The KL is then over top_k + 1 outcomes:
  at most the full one, and equal to it where the model keeps the proportions among the others (`tensors/divergence.py`).
* ``source="adapter"``: the model with its adapter off, one more forward pass per micro-batch; the full KL, nothing on disk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor

from hf_continual.bounds import at_least, between, one_of, plain_name, whole_number
from hf_continual.data.flat_rows import FlatRows, flat_rows
from hf_continual.data.replay import ReplayRows, RowType
from hf_continual.data.row_values import TEXTUAL
from hf_continual.data.rows import load_rows
from hf_continual.methods.base import PADDING, AddedRows, Forward, Method, Run, State
from hf_continual.methods.base_pass import CACHE, BaseValues, check_same_base, record_base
from hf_continual.paper import Paper
from hf_continual.tensors.divergence import full_divergence, top_of, truncated_divergence
from hf_continual.tensors.head import base_logits_function, logits_function, plain_model
from hf_continual.tensors.reference import as_reference, tokens_in_front

__all__ = ["KLToBase"]


@dataclass
class KLToBase(Method):
    """Hold the model's predictions to the base's while it learns; with ``weighting="probability"``, ASFT.

    Idea: the KL to the base on the new task predicts forgetting best; here it is part of the loss.
    Hooks: before training, rows, token weights, loss terms. Cost: ``"recorded"``: one forward pass over the rows before the
    first step and the head once more for their trained tokens in each step; 8 top_k + 4 bytes per trained token on disk, read
    by memory map, and 25 bytes per token in main memory. ``"adapter"``: a forward pass without gradients, and the head twice more, per micro-batch. Logits exist for
    256 tokens at a time.
    Relations: `GeRe` with ``constraint="kl"`` does this for hidden states of general text; the gauge `kl` measures it.
    Packing, padding-free batches, checkpointing and TRL's fused loss are supported. Composes with everything; tokens that
    another method masks have no KL, and rows that one adds neither. Refused: FSDP (the head is sharded), ZeRO-3, and
    ``loss_type="dft"`` together with ``weighting="probability"``.

    The base is the model with its adapters off. Where all weights are trained it is the model that the task starts from.

    Args:
        weight: Weight of the KL; 0.05 in ASFT's code, 0.1 in LLaMA-Factory's.
        weighting: ``"none"``, or ``"probability"``: each token of the task counts as much as the model believes in it.
        source: ``"recorded"`` or ``"adapter"``, see the module.
        top_k: Tokens of the base's prediction to record.
        rows: Rows to replay, as `Replay.rows`: the KL is on their tokens instead of the task's. None: on the task's own.
        ratio: Their fraction of the tokens of the mix, strictly between 0 and 1.
        per_batch: Instead of `ratio`: rows added to each micro-batch of each process.
        ce_weight: Weight of a replayed token in the likelihood; 0: it has a KL only.
        row_type: As in `Replay`.
        reference: ``"base"``, or the model at ``"task_start"`` with the adapter as it is then (``source="recorded"`` only).
        cache_dir: Folder of what is recorded; runs with the same rows and base share it.
        name: Prefix of the logged values, and name of the replay source.

    Raises:
        FileNotFoundError: If `rows` is a path that does not exist.
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If one is out of range, or they do not belong together.
    """

    weight: float = 0.05
    weighting: Literal["none", "probability"] = "none"
    source: Literal["recorded", "adapter"] = "recorded"
    top_k: int = 32
    rows: Dataset | str | list[dict[str, Any]] | None = None
    ratio: float | None = None
    per_batch: int | None = None
    ce_weight: float = 0.0
    row_type: RowType = "same"
    reference: Literal["base", "task_start"] = "base"
    cache_dir: str = CACHE
    name: str = "kl_to_base"  # pyrefly: ignore[bad-override]

    taps: ClassVar[tuple[str, ...]] = ("last_hidden_state",)
    places: ClassVar[tuple[str, ...]] = ("rows", "cache_dir")
    state_with_model: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper("Anchored Supervised Fine-Tuning", "Zhu et al.", 2025, arxiv="2509.23753")
    _base: BaseValues | None = field(default=None, init=False, repr=False, compare=False)
    _flat: FlatRows | None = field(default=None, init=False, repr=False, compare=False)
    _rank_T: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    _run: Run | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for key in ("weight", "ce_weight"):
            at_least("KLToBase", key, getattr(self, key), 0)
        for key, known in (
            ("weighting", ("none", "probability")), ("source", ("recorded", "adapter")), ("reference", ("base", "task_start")),
        ):  # fmt: skip
            one_of("KLToBase", key, getattr(self, key), known)
        whole_number("KLToBase", "top_k", self.top_k, unit="tokens of the vocabulary")
        plain_name("KLToBase", self.name)
        if self.source == "adapter" and self.reference == "task_start":
            raise ValueError(
                "KLToBase(source='adapter', reference='task_start'): with the adapter off the model is the base, not the model that "
                "the task starts from. Use source='recorded'."
            )
        self._check_rows()
        # Read now: a wrong path must fail before a model is loaded, not after.
        self._rows = None if self.rows is None else load_rows(self.rows, checked=TEXTUAL)

    def _check_rows(self) -> None:
        if (self.rows is None) != (self.ratio is None and self.per_batch is None) or (self.ratio and self.per_batch):
            raise ValueError(
                f"KLToBase(rows={'None' if self.rows is None else '...'}, ratio={self.ratio!r}, per_batch={self.per_batch!r}): replayed "
                f"rows need either ratio (fraction of tokens) or per_batch (rows per micro-batch); without rows the KL is on the "
                f"task's own tokens, and both stay None."
            )
        if self.ratio is not None:
            between("KLToBase", "ratio", self.ratio, 0, 1, note="It is the fraction of the mix's tokens.")
        if self.per_batch is not None:
            whole_number("KLToBase", "per_batch", self.per_batch, unit="rows per micro-batch")
        if self.rows is not None and not self.weight and not self.ce_weight:
            raise ValueError(
                "KLToBase(weight=0, ce_weight=0) would replay rows that have no part in the loss. Raise one, or drop rows."
            )

    def reads_reference(self) -> bool:
        """The base's predictions, or its head."""
        return self.weight != 0

    def reads_row_ids(self) -> bool:
        """To find the task's tokens in what was recorded."""
        return self.weight != 0 and self.source == "recorded" and self.rows is None

    def reads_forward(self) -> bool:
        """False where the loss is the plain one."""
        return self.weight != 0 or self.weighs_tokens()

    def weighs_tokens(self) -> bool:
        """Whether it is ASFT or DFT."""
        return self.weighting == "probability"

    def added_rows(self) -> AddedRows | None:
        """The replayed rows."""
        return None if self._rows is None else AddedRows(self.ratio, self.per_batch, float(self.ce_weight))

    def replay(self, run: Run) -> ReplayRows | None:
        """The replayed rows."""
        if self._rows is None:
            return None
        return ReplayRows(self._rows, self.ratio, self.per_batch, float(self.ce_weight), self.row_type)

    def prepare(self, run: Run) -> None:
        """Record the base's predictions, unless that was done; or refuse a model without a base to switch to."""
        if not self.weight or self._base is not None:
            return
        if self.source == "adapter":
            self._check_adapter(run)
            return
        self._flat = flat = flat_rows(run.task_rows if self._rows is None else run.rows(self), "KLToBase")
        self._base = record_base(
            run, flat, lambda logits_NV, target_N: top_of(logits_NV, self.top_k), "KLToBase", self.reference,
            self.cache_dir, top_k=self.top_k,
        )  # fmt: skip
        predicted_T = torch.from_numpy(flat.predicted_T)
        self._rank_T = torch.where(predicted_T, predicted_T.cumsum(0) - 1, -1)

    def _check_adapter(self, run: Run) -> None:
        if not isinstance(run.model, PeftModel):
            raise ValueError(
                f"KLToBase(source='adapter') switches an adapter off to ask the base, and this run trains the weights of "
                f"{type(run.model).__name__} itself. Use source='recorded', or give peft_config."
            )
        if tokens_in_front(run.model):
            raise ValueError(
                "KLToBase(source='adapter'): this adapter puts tokens in front of each row, so the base's positions would be others. "
                "Use source='recorded'."
            )

    def begin_task(self, run: Run) -> None:
        """Check that the rows are still those that were recorded."""
        self._run = run
        if self._flat is None or self._rows is not None:
            return
        number, now = len(self._flat.rows) - 1, flat_rows(run.task_rows, "KLToBase")
        same = len(now.rows) > number and (now.first(number).tokens_T.tolist() == self._flat.tokens_T.tolist())
        if not same or (now.rows[: number + 1] != self._flat.rows).any():
            raise ValueError(
                "KLToBase: another method changed tokens or order of the task's rows after the base read them, so its predictions "
                "would meet other tokens. Drop one of the two, or train an adapter with KLToBase(source='adapter')."
            )

    def weigh_tokens(self, forward: Forward) -> Tensor:
        """p_t; its mean over the task's tokens is logged."""
        p_BS, mask_BS = torch.exp(-forward.token_loss_BS.detach()), forward.label_mask()
        forward.note("probability", (p_BS * mask_BS).sum(), mask_BS.sum())
        return p_BS

    def loss_terms(self, forward: Forward) -> dict[str, Tensor]:
        """weight times the KL, as the trainer reduces the token loss."""
        if not self.weight or self._run is None:
            return {}
        kl_T, keep_T = self._from_record(forward) if self.source == "recorded" else self._from_adapter(forward)
        kept_T = kl_T * keep_T
        forward.note("kl", kept_T.sum(), keep_T.sum())
        return {"term": self.weight * forward.token_mean(kept_T)}

    def _from_record(self, forward: Forward) -> tuple[Tensor, Tensor]:
        """KL of each recorded token of the micro-batch, and whether it counts; nothing waits for the device."""
        assert self._flat is not None and self._rank_T is not None and self._base is not None and self._run is not None
        drawn = forward.task_drawn
        if self._rows is not None:
            mine = forward.sources.index(self.name)
            drawn = [(row, length) for source, row, length in forward.drawn if source == mine]
        starts, known = self._flat.rows, len(self._flat.rows) - 1
        ranks = [
            self._rank_T[starts[row] : starts[row] + length] if row < known else torch.full((length,), -1)
            for row, length in drawn
        ]
        use = torch.nonzero(torch.cat(ranks) >= 0).squeeze(1) if ranks else torch.zeros(0, dtype=torch.int64)
        hidden = forward.taps["last_hidden_state"].flatten(0, 1)
        mask = forward.mask(None if self._rows is None else self.name).flatten()
        where = torch.nonzero_static(mask, size=sum(length for _, length in drawn)).squeeze(1)
        where = where.index_select(0, use.to(mask.device, non_blocking=True))
        if not len(use):
            return hidden.new_zeros(1), hidden.new_zeros(1)
        ends = [
            (int(r.max()) + 1, int((r >= 0).sum())) for r in ranks
        ]  # the predicted tokens of a row follow each other
        read = [self._base.recorded.between(end - count, end) for end, count in ends if count]
        kept_TK = torch.cat(read).to(hidden.device, non_blocking=True)
        kl_T = truncated_divergence(hidden.index_select(0, where - 1), logits_function(self._run.model), kept_TK)
        return kl_T, (forward.inputs["labels"].flatten().index_select(0, where) != PADDING).to(kl_T.dtype)

    def _from_adapter(self, forward: Forward) -> tuple[Tensor, Tensor]:
        """KL of each token with a label; the base reads the micro-batch with the adapter off."""
        assert self._run is not None
        model = self._run.model
        inputs = {k: v for k, v in forward.inputs.items() if k not in ("labels", "use_cache")}
        with as_reference(model, "base"), self._run.autocast():
            base_BSD = plain_model(model).base_model(**inputs, use_cache=False).last_hidden_state
        mask_BS = forward.label_mask(None if self._rows is None else self.name)
        hidden_TD, base_TD = (h[:, :-1][mask_BS] for h in (forward.taps["last_hidden_state"], base_BSD))
        kl_T = full_divergence(hidden_TD, logits_function(model), base_TD, base_logits_function(model))
        return kl_T, torch.ones_like(kl_T)

    def state_dict(self, run: Run) -> State:
        """Fingerprint of the base that was recorded."""
        return {} if self._base is None else {"weights": self._base.weights}

    def load_state_dict(self, state: State, run: Run) -> None:
        """Refuse to resume with what another base says."""
        check_same_base("KLToBase", self._base, state.get("weights"))
