"""SFTRun: the part of a ContinualTrainer that a method sees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_continual import private
from hf_continual.methods.run import Batch, Named
from hf_continual.trainer.method_rows import prepare_rows
from hf_continual.trainer.trainer_run import TrainerRun

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor


class SFTRun(TrainerRun):
    """`TrainerRun` with what TRL's trainer adds: rows as it tokenises and collates them, and its fused head."""

    def rows(self, method: Named) -> Dataset:
        """The replay rows of a method."""
        mixer = self._trainer.mixer
        if mixer is None or method.name not in mixer.names:
            return super().rows(method)
        return mixer.rows[mixer.names.index(method.name)]

    def _kept(self, rows: Dataset, *more: str) -> Any:
        return rows.select_columns([c for c in ("input_ids", "labels", *more) if c in rows.column_names])

    def _tokenised(self, rows: Dataset, row_type: str, name: str) -> Dataset:
        return prepare_rows(self._trainer, rows, row_type, name)

    def _collate(self, rows: list[dict[str, Any]]) -> Batch:
        return private.on_device(self._trainer, self._trainer.data_collator(rows))

    def loss(self, batch: Batch) -> Tensor:
        """Token-mean loss of one batch, without its logits."""
        with self._trainer.compute_loss_context_manager():
            return self._trainer.model_wrapped(**{**batch, "use_cache": False}, fused_lm_head=True).loss
