"""Base classes of the kinds of modules that change inference; see `kinds.py` for how to add one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from hf_continual.inference.names import NAMES, KindName
from hf_continual.tensors.identity import base_sample

IGNORED = -100


@dataclass
class KindConfig(PeftConfig):
    """Configuration of a kind.

    Args:
        base_sample: Hash over a few values of the base model's weights (`hf_continual.tensors.identity.base_sample`);
            written when the modules are put onto it, and compared when they are loaded. None for quantised weights.
    """

    base_sample: str | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.task_type = "CAUSAL_LM"  # pyrefly: ignore[bad-assignment]

    @property
    def named(self) -> KindName:
        """The kind's names elsewhere."""
        return NAMES[str(self.peft_type)]

    @property
    def sizes(self) -> dict[str, Any]:
        """Entries that another configuration must share to continue training modules with this one."""
        return {key: getattr(self, key) for key in self.named.sizes}

    @property
    def chooses_by_row(self) -> bool:
        """Whether it chooses for a row as a whole, so that rows cannot share a sequence."""
        return True

    @property
    def tokens_in_front(self) -> int:
        """Number of positions it adds in front of each row."""
        return 0


class KindTuner:
    """Mixin that puts the modules of a kind on a model; to be listed before one of PEFT's tuners.

    The modules must not see the answer when they choose: at inference there is none yet. In training, the question is
    everything before the first label; elsewhere `asked` marks it, and without that all tokens are the question.
    """

    prefix: str = ""
    asked_BS: Tensor | None = None
    peft_config: dict[str, Any]
    active_adapter: Any

    @property
    def active_config(self) -> KindConfig:
        """The configuration of the active modules."""
        name = self.active_adapter if isinstance(self.active_adapter, str) else self.active_adapter[0]
        return self.peft_config[name]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass, with the question derived from the labels."""
        labels, mask = kwargs.get("labels"), kwargs.get("attention_mask")
        if labels is None or self.asked_BS is not None:
            return super().forward(*args, **kwargs)  # pyrefly: ignore[missing-attribute]
        with self.asked(question_mask(labels, mask)):
            return super().forward(*args, **kwargs)  # pyrefly: ignore[missing-attribute]

    @contextmanager
    def asked(self, mask_BS: Tensor) -> Iterator[None]:
        """Mark the tokens of the question for forward passes inside the context that start without a cache."""
        before, self.asked_BS = self.asked_BS, mask_BS
        try:
            yield
        finally:
            self.asked_BS = before

    def keep_rows(self, index_N: Tensor) -> None:
        """Keep some rows of the batch; a kind that stores something per row since the first pass selects it here."""

    @contextmanager
    def for_task(self, name: str) -> Iterator[None]:
        """While a task is scored; a kind whose choice depends on the task is set to it here.

        Args:
            name: Name of the task, which may be one that was not learned.

        Yields:
            None: While it is set.
        """
        yield

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model does, from an empty cache and with one: a row's first choice holds to its last token.

        Args:
            *args: The model's arguments.
            **kwargs: The model's arguments.

        Returns:
            The model's output.

        Raises:
            ValueError: If a cache with tokens in it is given.
        """
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise ValueError(
                f"generate() was given a cache with {cache.get_seq_length()} tokens (past_key_values), and {self.active_config.peft_type} "
                f"modules choose by the whole question. Leave past_key_values out, and give the whole conversation as input_ids."
            )
        return self.model.generate(*args, **{**kwargs, "use_cache": True})  # pyrefly: ignore[missing-attribute]

    def check_base(self, config: KindConfig, model: nn.Module) -> None:
        """Record the base that the modules belong to, or refuse another; call it before they are added to the model.

        Args:
            config: The configuration.
            model: The base model.

        Raises:
            ValueError: If the weights are not those that the modules were trained on.
        """
        now = base_sample(model)
        if config.base_sample is None:
            config.base_sample = now
        elif now is not None and now != config.base_sample:
            raise ValueError(
                f"the {config.peft_type} modules were trained on {config.base_model_name_or_path or 'another base'}, and the model "
                f"they are put onto ({getattr(model, 'name_or_path', '') or type(model).__name__}) has different weights: the modules are "
                f"useless there. Load the base that adapter_config.json names (base_model_name_or_path)."
            )

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            f"{self.active_config.peft_type} modules choose for each row, so they cannot be merged into weights. Keep them "
            f"next to their base."
        )


@torch.no_grad()
def question_mask(labels_BS: Tensor, mask_BS: Tensor | None) -> Tensor:
    """Tokens before the first label; all tokens of a row that has none before it (text without a question)."""
    real_BS = torch.ones_like(labels_BS, dtype=torch.bool) if mask_BS is None else mask_BS.bool()
    before_BS = (labels_BS != IGNORED).cumsum(1).eq(0) & real_BS
    return torch.where(before_BS.any(1, keepdim=True), before_BS, real_BS)
