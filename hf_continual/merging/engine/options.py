"""How an output is written: the options that all merges share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from typing_extensions import TypedDict

from hf_continual.merging.inputs.quantization import QuantizedBase, read_quantized_base
from hf_continual.merging.inputs.safetensors_file import DTYPES

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class OutputOptions(TypedDict, total=False):
    """Options of every merge.

    Args:
        output: ``"model"``, ``"adapter"``, or None: an adapter if all inputs are adapters of one base and the rule adds
            their changes up, else a model.
        adapter_rank: Rank of an adapter output; None keeps the exact sum, whose rank is the sum of the ranks.
        dtype: dtype of the output weights; None keeps the first model's, tensor by tensor.
        max_shard_size: Largest size of a weight file, in bytes or as a string such as ``"5GB"``.
        vocab: ``"extend"`` allows longer vocabularies that continue the shorter ones.
        resume: Whether to resume an interrupted merge of the same inputs.
        overwrite: Whether to replace a non-empty output folder, once the new one is complete.
        dry_run: Whether to run every check, print the plan, and write nothing.
        progress: Whether to show a progress bar; None: if the standard error is a terminal.
        quantized_base: Base weights for an adapter that was trained on a 4- or 8-bit base: the ``"original"`` `base` as
            given; its values after quantisation and back, as the adapter saw them (``"dequantize"``, quantised as its folder
            states, or a `BitsAndBytesConfig` or its dictionary); or none, with an error (``"error"``).
        push_to_hub: Hub id to push the result to, checked before the merge, see `hf_continual.push_to_hub`.
        private: Whether a new repository is private; None: the account's default, or unchanged.
        token: Access token; by default that of HF_TOKEN or ``hf auth login``. It is never written to disk.
        license: Licence of the result; needed for a push if the inputs' licences differ.
    """

    output: Literal["model", "adapter"] | None
    adapter_rank: int | None
    dtype: str | None
    max_shard_size: int | str
    vocab: Literal["strict", "extend"]
    resume: bool
    overwrite: bool
    dry_run: bool
    progress: bool | None
    quantized_base: QuantizedBase
    push_to_hub: str | None
    private: bool | None
    token: str | None
    license: str | None


@dataclass(frozen=True)
class Output:
    """`OutputOptions` with their defaults, checked. `dtype` is safetensors' name of the dtype, sizes are in bytes."""

    output: str | None = None
    adapter_rank: int | None = None
    dtype: str | None = None
    max_shard_size: int = 5 * 10**9
    vocab: str = "strict"
    resume: bool = True
    overwrite: bool = False
    dry_run: bool = False
    progress: bool | None = None
    quantized_base: QuantizedBase = "original"
    push_to_hub: str | None = None
    private: bool | None = None
    token: str | None = field(default=None, repr=False)
    license: str | None = None


def read_output(options: Mapping[str, Any]) -> Output:
    """Check options and fill in defaults.

    Args:
        options: What the user gave.

    Returns:
        All of them.

    Raises:
        TypeError: If an option does not exist.
        ValueError: If a value is not allowed.
    """
    known = [f.name for f in fields(Output)]
    if unknown := [k for k in options if k not in known]:
        raise TypeError(f"there is no option {', '.join(map(repr, unknown))}; the options are {', '.join(known)}.")
    values = dict(options)
    for key, allowed in (("output", (None, "model", "adapter")), ("vocab", ("strict", "extend"))):
        if key in values and values[key] not in allowed:
            raise ValueError(f"{key}={values[key]!r}: it must be one of {', '.join(map(repr, allowed))}.")
    read_quantized_base(values.get("quantized_base", "original"))
    if (license := values.get("license")) is not None:
        from hf_continual.hub.licences import inherit  # imported only when a licence is to be checked

        inherit({}, license)
    rank = values.get("adapter_rank")
    if rank is not None and rank < 1:
        raise ValueError(f"adapter_rank={rank}: a rank must be at least 1.")
    if values.get("dtype") is not None:
        given = str(values["dtype"]).removeprefix("torch.")
        if _NAMES.get(given, given) not in _NAMES.values():
            raise ValueError(f"dtype={values['dtype']!r}: it must be one of {', '.join(_NAMES)}.")
        values["dtype"] = _NAMES.get(given, given)
    if "max_shard_size" in values:
        values["max_shard_size"] = read_size(values["max_shard_size"])
    return Output(**values)


def read_size(size: int | str) -> int:
    """Bytes of a size such as ``"5GB"`` (10^9) or ``"512MiB"`` (2^20)."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)?\s*", str(size).upper())
    number = int(float(found[1]) * _UNITS.get(found[2] or "", 1)) if found else 0
    if number < 1:
        raise ValueError(f"max_shard_size={size!r}: give a number of bytes, or a string such as '5GB' or '512MiB'.")
    return number


def transformers_name(dtype: str) -> str:
    """The name of a dtype in ``config.json``."""
    return str(DTYPES[dtype]).removeprefix("torch.")
