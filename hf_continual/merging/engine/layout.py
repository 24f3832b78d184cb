"""The output's layout, known before a value is read: its kind, its tensors, its files and its configuration."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_continual.merging.engine.adapter_output import adapter_config, adapter_tensors, check_adapter_output
from hf_continual.merging.engine.chunks import OutputTensor
from hf_continual.merging.engine.job import Job
from hf_continual.merging.engine.model_output import model_config, model_tensors
from hf_continual.merging.engine.options import Output, transformers_name
from hf_continual.merging.engine.shards import Shard, make_shards
from hf_continual.merging.errors import MergeError
from hf_continual.merging.inputs.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG

_ADAPTER_STEM = ADAPTER_WEIGHTS.removesuffix(".safetensors")


@dataclass(frozen=True)
class Layout:
    """What will be written.

    Args:
        kind: ``"model"`` or ``"adapter"``.
        rank: Highest rank of an adapter.
        shards: Weight files, with the sources of their tensors.
        config: The output's configuration.
        config_file: File with exactly this content, to be copied, or None.
        errors: Truncation error of each module, filled in while it is written.
    """

    kind: str
    rank: int | None
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    config_file: Path | None
    errors: dict[str, float] = field(default_factory=dict)


def lay_out(job: Job, options: Output, notes: list[str]) -> Layout:
    """Lay the output out; only headers and configurations are read.

    Args:
        job: The merge.
        options: How it is written.
        notes: Receives notes for the user.

    Returns:
        The layout.

    Raises:
        ValueError: If an option does not fit the output.
        MergeError: If the models do not fit, or an adapter cannot hold the result.
    """
    outputs = job.outputs(options, notes)
    if outputs is not None and job.members[0].checkpoint.is_adapter:
        # Factors combined element by element: an adapter is one file, and the configuration is the one that all have.
        reference = job.members[0].checkpoint
        file = reference.folder / ADAPTER_CONFIG
        return Layout("adapter", reference.config.get("r"), _one_file(outputs), reference.config, file)
    if outputs is None and _kind(job, options) == "adapter":
        return _adapter(job, options)
    return _model(job, options, outputs, notes)


def _kind(job: Job, options: Output) -> str:
    why_not = check_adapter_output(job.members, job.base, job.linear)
    if options.output == "adapter" and why_not:
        raise MergeError(f"output='adapter' is not possible: {why_not}. Give output='model'.")
    if options.output is not None:
        return options.output
    return "model" if why_not else "adapter"


def _adapter(job: Job, options: Output) -> Layout:
    if job.base is not None and job.base.seen_as is not None:
        raise ValueError(
            f"quantized_base={options.quantized_base!r} changes the base, but the output is an adapter, which leaves it "
            f"unchanged. Give output='model', or leave quantized_base out."
        )
    errors: dict[str, float] = {}
    outputs, ranks = adapter_tensors(job.members, job.rule_for, options.adapter_rank, options.dtype, errors)
    config, rank = adapter_config(job.members, ranks), max(ranks.values(), default=0)
    if options.adapter_rank is not None and rank < options.adapter_rank:
        warnings.warn(
            f"adapter_rank={options.adapter_rank} is more than the exact sum has: the adapter has rank {rank} and nothing is "
            f"truncated.",
            UserWarning,
            stacklevel=5,
        )
    return Layout("adapter", rank, _one_file(outputs), config, None, errors)


def _model(job: Job, options: Output, outputs: list[OutputTensor] | None, notes: list[str]) -> Layout:
    if options.adapter_rank is not None:
        raise ValueError(f"adapter_rank={options.adapter_rank} is for output='adapter'; this output is a full model.")
    if job.base is not None:
        notes += job.base.notes
    if outputs is None:
        outputs = model_tensors(job.members, job.rule_for, options.dtype, options.vocab, notes)
    reference = job.members[0].checkpoint
    named = None if options.dtype is None else transformers_name(options.dtype)
    config = model_config(reference, outputs, named)
    file = reference.folder / CONFIG if config == reference.config else None
    return Layout("model", None, tuple(make_shards(outputs, options.max_shard_size)), config, file)


def _one_file(outputs: Sequence[OutputTensor]) -> tuple[Shard, ...]:
    return tuple(make_shards(outputs, max(1, sum(t.nbytes for t in outputs)), _ADAPTER_STEM))
