"""`merge_with_recall`; see `hf_continual.merging.methods.recall.method`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from hf_continual.merging.errors import MergeError
from hf_continual.merging.methods.recall.method import Recall, RecallMergeResult
from hf_continual.merging.methods.recall.similarity import Bandwidth
from hf_continual.merging.pipeline import merge_by

if TYPE_CHECKING:
    from datasets import Dataset
    from typing_extensions import Unpack

    from hf_continual.merging.engine.options import OutputOptions


class RecallMergeError(MergeError):
    """A `MergeError` of `merge_with_recall`."""


def merge_with_recall(
    models: Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    calibration: Sequence[str] | Sequence[Mapping[str, Any]] | Dataset | None = None,
    calibration_mode: Literal["data", "self"] = "data",
    anchor: int | str = -1,
    include_base: bool | Literal["auto"] = "auto",
    num_typical: int = 20,
    pool_size: int = 512,
    max_length: int = 512,
    seed: int = 0,
    bandwidth: Bandwidth = "anchor_spread",
    temperature: float = 1.0,
    reference: Literal["anchor", "all_pairs"] = "anchor",
    nonblock: Literal["representation", "uniform", "anchor", "base"] = "representation",
    weights: Mapping[str, Sequence[float]] | str | os.PathLike[str] | None = None,
    device: str | None = None,
    calibration_dtype: str | None = None,
    low_memory: bool = False,
    **output: Unpack[OutputOptions],
) -> RecallMergeResult:
    """Merge models of a sequence of tasks with one weight per model and layer, found from representations.

    No data of earlier tasks is needed: texts of the newest task, or none at all with ``calibration_mode="self"``.
    Several experts at once (joint), or the merge so far and the newest (running). The weights are never loaded whole.

    Example:
        >>> merge_with_recall(["law", "tax", "tickets"], "merged", base="Qwen/Qwen2.5-0.5B", calibration=ticket_rows)
        >>> merge_with_recall(["law", "tax", "tickets"], "again", base="...", weights="merged/recall_report.json")

    Args:
        models: Full models and LoRA adapters in any mix, oldest first, newest last: folders or ``"id@revision"``.
        output_dir: Output folder; complete or absent.
        base: The full model that adapters belong to; a single model is merged with it.
        calibration: Texts of the newest task, or rows with text, messages, or prompt and completion.
        calibration_mode: ``"self"`` lets the newest model write the texts.
        anchor: The newest model, by index or name.
        include_base: Whether the base is one of the models; ``"auto"``: with a single expert only.
        num_typical: Number of texts that all models see, one per cluster.
        pool_size: Number of texts that are clustered, evenly spaced in `calibration`.
        max_length: Tokens per text.
        seed: Seed of the clustering, and of the texts of ``"self"``.
        bandwidth: sigma of the similarity, see `layer_weights`.
        temperature: Temperature of the softmax over models.
        reference: What models are compared with: the anchor, or all models.
        nonblock: Weights of embeddings, final norm and head: from their representations, equal, the anchor alone, or
            the base alone.
        weights: A ``recall_report.json`` to reuse, or one list per group (``"embed"``, ``"layer.0"``, ..., ``"final"``;
            ``"default"`` for those not named); skips calibration.
        device: Where models run for calibration; None: the accelerator if there is one.
        calibration_dtype: dtype they run in; None: the checkpoint's, on a CPU never float16.
        low_memory: Whether to read their blocks from disk as needed.
        **output: Form of the output and how it is written, see `OutputOptions`.

    Returns:
        Where the result is, the weights and how they were found.

    Raises:
        ValueError: If an argument does not fit.
        RecallMergeError: If the models do not fit, or a file changes meanwhile.
        FileExistsError: If the output folder is in use.
        OSError: If the disk is full.
    """
    method = Recall(
        calibration=calibration, calibration_mode=calibration_mode, anchor=anchor, include_base=include_base,
        num_typical=num_typical, pool_size=pool_size, max_length=max_length, seed=seed, bandwidth=bandwidth,
        temperature=temperature, reference=reference, nonblock=nonblock, weights=weights, device=device,
        calibration_dtype=calibration_dtype, low_memory=low_memory,
    )  # fmt: skip
    try:
        done = merge_by(method, models, output_dir, base=base, **output)
    except MergeError as error:
        raise RecallMergeError(*error.args) from error
    assert isinstance(done, RecallMergeResult)
    return done
