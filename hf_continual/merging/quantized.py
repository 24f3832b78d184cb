"""Adapters that were trained on a base in 4 or 8 bits (QLoRA: Dettmers et al. 2023), and what such a base is.

The adapter saw W_q = dequantised(quantised(W)). Put onto the 16-bit W it meets slightly other weights; put onto W_q it is
exactly what was trained, in 16 bits. Which is better depends on the model; the original is the default. How the base
was quantised is read from the adapter's folder (`ContinualTrainer` notes it) or from the base that its configuration names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

    from hf_continual.merging.checkpoints import Checkpoint

    QuantizedBase = Literal["error", "original", "dequantize"] | Mapping[str, Any] | BitsAndBytesConfig
else:  # a loaded transformers is not needed to say what the option can be
    QuantizedBase = Any

_WORDS = ("error", "original", "dequantize")


@dataclass(frozen=True)
class Quantization:
    """How bitsandbytes stores linear layers.

    Args:
        kind: ``"nf4"``, ``"fp4"`` or ``"int8"``.
        double: Whether the scales of the blocks are quantised too (double quantisation).
        skip: Modules that stay as they are; None: those that transformers leaves out by itself, such as the head.
    """

    kind: str
    double: bool = False
    skip: tuple[str, ...] | None = None

    @property
    def words(self) -> str:
        """For a sentence, such as ``"4 bits (nf4, double quantisation)"``."""
        if self.kind == "int8":
            return "8 bits"
        return f"4 bits ({self.kind}{', double quantisation' if self.double else ''})"


def read_quantized_base(given: QuantizedBase) -> str | Quantization:
    """Check the option.

    Args:
        given: What the user gave.

    Returns:
        One of the words, or how the base was quantised.

    Raises:
        ValueError: If it is none of what it can be.
    """
    if isinstance(given, str) and given in _WORDS:
        return given
    data = given if isinstance(given, Mapping) else None if isinstance(given, str) else _as_dict(given)
    if data is None:
        raise ValueError(
            f"quantized_base={given!r}: it can be {', '.join(map(repr, _WORDS))}, or a BitsAndBytesConfig or its dictionary."
        )
    return read_quantization(data)


def _as_dict(config: Any) -> Mapping[str, Any] | None:
    return config.to_dict() if hasattr(config, "to_dict") else None


def read_quantization(config: Mapping[str, Any]) -> Quantization:
    """A ``quantization_config`` of transformers, or the options of a `BitsAndBytesConfig`.

    Args:
        config: Plain data.

    Returns:
        What decides the values.

    Raises:
        ValueError: If it is no quantisation by bitsandbytes.
    """
    method = config.get("quant_method", "bitsandbytes")
    method = getattr(method, "value", method)
    four, eight = (config.get(k, config.get(f"_{k}")) for k in ("load_in_4bit", "load_in_8bit"))
    if method != "bitsandbytes" or bool(four) == bool(eight):
        raise ValueError(
            f"a base quantised by {method!r} (load_in_4bit={four}, load_in_8bit={eight}) cannot be made again here: only "
            f"bitsandbytes' 4 and 8 bits can. Save the dequantised base (model.dequantize(), save_pretrained) and give that as "
            f"base=."
        )
    skipped = config.get("llm_int8_skip_modules")
    skip = None if skipped is None else tuple(skipped)
    if eight:
        return Quantization("int8", skip=skip)
    return Quantization(
        config.get("bnb_4bit_quant_type", "fp4"), bool(config.get("bnb_4bit_use_double_quant", False)), skip
    )


def known_quantization(adapter: Checkpoint) -> Quantization | None:
    """How the base of an adapter was quantised while it was trained, as far as the files on this machine tell.

    Args:
        adapter: The adapter.

    Returns:
        How, or None if it was not or nobody noted it.
    """
    noted = _read(adapter.folder / "continual_config.json").get("adapter", {}).get("quantization")
    if noted is not None:
        return read_quantization(noted)
    named = adapter.config.get("base_model_name_or_path")
    if not named:
        return None
    config = Path(named) / "config.json"
    if not config.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(str(named), "config.json", revision=adapter.config.get("revision"))
        except HFValidationError:  # a folder of another machine
            return None
        config = Path(found) if isinstance(found, str) else config
    noted = _read(config).get("quantization_config")
    return None if noted is None else read_quantization(noted)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
