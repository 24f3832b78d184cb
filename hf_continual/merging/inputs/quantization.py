"""Adapters that were trained on a 4- or 8-bit base (QLoRA: Dettmers et al. 2023): how the base was quantised.

The adapter saw W_q = dequantised(quantised(W)). Applied to the 16-bit W, it meets slightly different weights; applied to W_q, it is
what was trained, in 16 bits. Which is better depends on the model; the original is the default. How a base was quantised
is read from the adapter's folder (`ContinualTrainer` records it) or from the base that its configuration names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

    from hf_continual.merging.inputs.checkpoint import Checkpoint

    QuantizedBase = Literal["error", "original", "dequantize"] | Mapping[str, Any] | BitsAndBytesConfig
else:  # transformers need not be loaded to state the option's type
    QuantizedBase = Any

_WORDS = ("error", "original", "dequantize")
_TYPES = ("bfloat16", "float16", "float32")
# The keys of a BitsAndBytesConfig, and the dtype that the weights had.
_KNOWN = (
    "quant_method", "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "llm_int8_skip_modules",
    "llm_int8_threshold", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight", "dtype",
)  # fmt: skip


@dataclass(frozen=True)
class Quantization:
    """How bitsandbytes stores linear layers.

    Args:
        kind: ``"nf4"``, ``"fp4"`` or ``"int8"``.
        double: Whether the scales of the blocks are quantised too (double quantisation).
        skip: Modules that are not quantised, in order; None: those that transformers leaves out, such as the head.
        dtype: dtype that the weights were loaded in and are dequantised to; None: the stored dtype.
    """

    kind: str
    double: bool = False
    skip: tuple[str, ...] | None = None
    dtype: str | None = None

    @property
    def words(self) -> str:
        """Words for a message, such as ``"4 bits (nf4, double quantisation)"``."""
        told = [] if self.kind == "int8" else [self.kind]
        told += ["double quantisation"] if self.double else []
        told += [f"from {self.dtype}"] if self.dtype else []
        told += [f"without {', '.join(self.skip)}"] if self.skip else []
        return f"{8 if self.kind == 'int8' else 4} bits" + (f" ({', '.join(told)})" if told else "")


@dataclass(frozen=True)
class Known:
    """What files state about the base of an adapter.

    Args:
        raw: The entry as written.
        quantization: The same, parsed; None if it is not by bitsandbytes.
    """

    raw: Mapping[str, Any]
    quantization: Quantization | None

    @property
    def words(self) -> str:
        """Words for a message."""
        return self.quantization.words if self.quantization is not None else f"the form of {_method(self.raw)!r}"


def read_quantized_base(given: QuantizedBase) -> str | Quantization:
    """Check the option.

    Args:
        given: What the user gave.

    Returns:
        One of the keywords, or how the base was quantised.

    Raises:
        ValueError: If it is not an allowed value.
    """
    if isinstance(given, str) and given in _WORDS:
        return given
    data = given if isinstance(given, Mapping) else given.to_dict() if hasattr(given, "to_dict") else None
    if data is None:
        raise ValueError(
            f"quantized_base={given!r}: it must be one of {', '.join(map(repr, _WORDS))}, or a BitsAndBytesConfig or its dictionary."
        )
    found = read_quantization(data)
    if strange := [k for k in data if k not in _KNOWN]:
        raise ValueError(
            f"quantized_base has the key {strange[0]!r}, which is not about quantisation by bitsandbytes; the keys are "
            f"{', '.join(_KNOWN[:3] + _KNOWN[5:])}."
        )
    return found


def _method(config: Mapping[str, Any]) -> str:
    method = config.get("quant_method", "bitsandbytes")
    return str(getattr(method, "value", method))


def read_quantization(config: Mapping[str, Any]) -> Quantization:
    """Parse a ``quantization_config`` of transformers, or the options of a `BitsAndBytesConfig`.

    Args:
        config: Plain data; ``dtype`` is the dtype that the weights had.

    Returns:
        The settings that determine the values.

    Raises:
        ValueError: If it is not a quantisation by bitsandbytes, or of an unknown type.
    """
    four, eight = (bool(config.get(k, config.get(f"_{k}"))) for k in ("load_in_4bit", "load_in_8bit"))
    if _method(config) != "bitsandbytes" or four == eight:
        raise ValueError(
            f"a base quantised by {_method(config)!r} (load_in_4bit={four}, load_in_8bit={eight}) cannot be reproduced here: "
            f"only bitsandbytes' 4 and 8 bits are supported. Save the dequantised base (model.dequantize(), save_pretrained) and give "
            f"that as base=."
        )
    kind = "int8" if eight else config.get("bnb_4bit_quant_type", "fp4")
    if kind not in ("int8", "nf4", "fp4"):
        raise ValueError(f"bnb_4bit_quant_type={kind!r}: it must be 'nf4' or 'fp4'.")
    dtype = config.get("dtype")
    dtype = None if dtype is None else str(dtype).removeprefix("torch.")
    if dtype not in (None, *_TYPES):
        raise ValueError(f"dtype={dtype!r}: bitsandbytes quantises {', '.join(_TYPES)}.")
    skipped = config.get("llm_int8_skip_modules")
    skip = None if skipped is None else tuple(sorted(set(skipped)))
    double = not eight and bool(config.get("bnb_4bit_use_double_quant", False))
    return Quantization(kind, double, skip, dtype)


def known_quantization(adapter: Checkpoint) -> Known | None:
    """How the base of an adapter was quantised while it was trained, as far as the files on this machine state it.

    Args:
        adapter: The adapter.

    Returns:
        How, or None if it was not quantised or this was not recorded.
    """
    noted = _read(adapter.folder / "continual_config.json").get("adapter", {}).get("quantization")
    if noted is None and (config := _base_config(adapter)) is not None:
        noted = config.get("quantization_config")
        dtype = config.get("dtype", config.get("torch_dtype"))
        noted = None if noted is None else {**noted, **({"dtype": dtype} if dtype in _TYPES else {})}
    if noted is None:
        return None
    try:
        return Known(noted, read_quantization(noted))
    except ValueError:
        return Known(noted, None)


def _base_config(adapter: Checkpoint) -> dict[str, Any] | None:
    named = adapter.config.get("base_model_name_or_path")
    if not named:
        return None
    config = Path(named) / "config.json"
    if config.is_file():
        return _read(config)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(str(named), "config.json", revision=adapter.config.get("revision"))
    except HFValidationError:  # a folder on another machine
        return None
    return _read(Path(found)) if isinstance(found, str) else None


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def completed(given: Quantization, known: Quantization | None) -> Quantization:
    """A user's choice, completed with what only the files state: the dtype, and modules that were left out."""
    if known is None:
        return given
    unsaid = {f.name: getattr(known, f.name) for f in fields(given) if getattr(given, f.name) is None}
    return replace(given, **unsaid)
