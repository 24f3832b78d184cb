"""One pass of the base model over rows before training: its predictions of their tokens, recorded for the methods that need them.

The base is the model without its adapters, or, where all weights are trained, the model that the task starts from. The pass
is split over the processes; if killed, it resumes; runs with the same base and rows share its file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_continual.data.distributed import all_well, gathered
from hf_continual.data.flat_rows import Document, FlatRows
from hf_continual.data.recording import DIGITS, Recorded, key_of, record
from hf_continual.methods.run import Run
from hf_continual.tensors.head import head_differs, logits_function
from hf_continual.tensors.reference import (
    Reference,
    as_reference,
    last_hidden,
    numerics,
    own_logits,
    virtual_tokens,
    weights_fingerprint,
)

CACHE = "~/.cache/hf_continual/base"
TILE = 256  # tokens whose logits exist at once, in float32

Values = Callable[[Tensor, Tensor], Tensor]  # logits (N, V) and targets (N) to what is kept (N, ...)


@dataclass(frozen=True)
class BaseValues:
    """What a base says of the predicted tokens of rows.

    Args:
        recorded: The open file; its values are those of `FlatRows.predicted_T`, in order.
        weights: Fingerprint of the base.
    """

    recorded: Recorded
    weights: str


def weights_of_first(run: Run, reference: Reference) -> tuple[str, bool]:
    """Fingerprint of process 0's weights, and whether this process holds them."""
    own = weights_fingerprint(run.model, reference)
    first = gathered(own)[0]
    return first, own == first


def record_base(
    run: Run,
    flat: FlatRows,
    values: Values,
    who: str,
    reference: Reference,
    cache_dir: str,
    **numbers: Any,
) -> BaseValues:
    """Record what the base says of each predicted token; a valid file of the same base and rows is used again.

    Args:
        run: The run, before its model is wrapped.
        flat: The rows.
        values: What to keep of the logits; called with at most `TILE` tokens.
        who: The method, for messages and the file's key.
        reference: ``"base"`` without adapters, ``"task_start"`` with them.
        cache_dir: Folder of the file.
        **numbers: Hyper-parameters that the values depend on.

    Returns:
        The values.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If no token is predicted, or the logits cannot be computed from the last hidden states.
    """
    documents = flat.reading()
    if not documents:
        raise ValueError(
            f"{who}: none of the {len(flat.rows) - 1} rows has a token to predict, so there is nothing to ask the base. Check "
            f"the rows' labels."
        )
    weights, able = weights_of_first(run, reference)
    facts: dict[str, Any] = {
        "rows": flat.digest(), "what": who, **numbers, "version": 1, "autocast": run.autocast_dtype,
        **numerics(run.model, run.tokenizer),
    }  # fmt: skip
    if reference == "task_start" and (virtual := virtual_tokens(run.model)):
        facts["virtual_tokens"] = virtual
    file = Path(cache_dir).expanduser() / f"{key_of(facts)}-{weights[:DIGITS]}.safetensors"
    facts["weights"] = weights
    with as_reference(run.model, reference), run.autocast():
        all_well(_problem_of(run.model, documents[0], who) if able else None)
        said = _Saying(run.model, values)
        found = record(file, facts, documents, said, able=able, title=f"{who}: the base reads the rows")
    return BaseValues(found, weights)


def _problem_of(model: nn.Module, document: Document, who: str) -> ValueError | None:
    """Why the model's logits cannot be computed from its last hidden states, if so."""
    tokens = document.tokens[:TILE].tolist()
    problem = head_differs(model, last_hidden(model, tokens), own_logits(model, tokens))
    return None if problem is None else ValueError(f"{who} cannot compute this model's logits: {problem}. Drop {who}.")


class _Saying:
    """The values of a document's predicted tokens.

    Args:
        model: The base.
        values: What to keep of its logits.
    """

    def __init__(self, model: nn.Module, values: Values) -> None:
        self.model, self.values, self.logits = model, values, logits_function(model)

    def __call__(self, document: Document) -> Tensor:
        """Shape (N, ...)."""
        hidden_SD = last_hidden(self.model, document.tokens.tolist())
        where_N = torch.from_numpy(document.predicted - 1).to(hidden_SD.device)
        target_N = torch.from_numpy(document.tokens[document.predicted]).to(hidden_SD.device)
        parts = zip(hidden_SD[where_N].split(TILE), target_N.split(TILE), strict=True)
        return torch.cat([self._tile(hidden_ND, target) for hidden_ND, target in parts])

    def _tile(self, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
        logits_NV = self.logits(hidden_ND).float()
        return self.values(logits_NV, target_N.to(logits_NV.device))


def check_same_base(who: str, now: BaseValues | None, then: str | None) -> None:
    """Refuse to resume a run with what another base said.

    Args:
        who: The method.
        now: The values of this run; None if it has none.
        then: Fingerprint of the base that the run began with.

    Raises:
        ValueError: If the base differs.
    """
    if now is not None and then is not None and now.weights != then:
        raise ValueError(
            f"{who}: the run to resume began with another base (weights {then[:DIGITS]}, now {now.weights[:DIGITS]}). Build the "
            f"trainer with the same model as before, not with a checkpoint of it."
        )


def negative_log_likelihood(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """-log p of each token in nats, from logits in float32; shape (N)."""
    return torch.logsumexp(logits_NV, -1) - logits_NV.gather(-1, target_N[:, None])[:, 0]


def all_values(values: BaseValues) -> np.ndarray:
    """The values of all predicted tokens, in order."""
    return values.recorded.tensor("values").numpy()
