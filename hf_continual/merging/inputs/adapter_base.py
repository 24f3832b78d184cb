"""Choose the base weights for adapters that were trained on a 4- or 8-bit base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from hf_continual.merging.errors import MergeError, some
from hf_continual.merging.inputs.checkpoint import Checkpoint
from hf_continual.merging.inputs.dequantization import dequantized, linear_weights
from hf_continual.merging.inputs.quantization import (
    Known,
    Quantization,
    QuantizedBase,
    completed,
    known_quantization,
    read_quantized_base,
)


def base_as_asked(base: Checkpoint, adapters: Sequence[Checkpoint], given: QuantizedBase) -> Checkpoint:
    """Choose the base that adapters are applied to.

    Args:
        base: The base that was given.
        adapters: The adapters on it.
        given: Option `quantized_base`.

    Returns:
        The base, with a note on what each adapter is applied to; its values are dequantised if that was requested.

    Raises:
        MergeError: If that cannot be done, or `given` is ``"error"`` and an adapter was trained on a quantised base.
    """
    choice = read_quantized_base(given)
    told = [(a.name, known_quantization(a)) for a in adapters]
    known = [(name, k) for name, k in told if k is not None]
    said = "; ".join(f"{name} was trained on a base in {k.words}" for name, k in known)
    if choice in ("original", "error"):
        if known and choice == "error":
            raise MergeError(
                f"{said}, and quantized_base='error'. Give quantized_base='original' to apply it to the weights of "
                f"{base.name} as they are, or 'dequantize' to apply it to the values that it saw."
            )
        note = f"{said}; what was learned is added to the original weights of {base.name}."
        return replace(base, notes=(*base.notes, note)) if known else base
    if not adapters:
        raise MergeError(
            f"quantized_base={given!r} describes the base that adapters saw, but none of the models is an adapter. Leave it out."
        )
    _check_known(told, choice, said)
    seen = [(name, k.quantization) for name, k in known if k.quantization is not None]
    asked = completed(choice, seen[0][1] if seen else None) if isinstance(choice, Quantization) else seen[0][1]
    shown = dequantized(base, asked)
    for name, other in seen:
        if other != asked and not _same(base, shown, asked, other):
            words = (
                f"{seen[0][0]} in {asked.words}" if choice == "dequantize" else f"quantized_base= says {asked.words}"
            )
            raise MergeError(
                f"{name} was trained on a base in {other.words}, and {words}: they saw different weights. Merge on the original "
                f"base, or merge each into its own base first."
            )
    whole = len(known) == len(adapters)
    whose = "as the adapters' training saw them" if whole else "as quantized_base= says they were trained"
    note = f"What was learned is added to the weights of {base.name} after {asked.words} and back, {whose}."
    return replace(shown, notes=(*shown.notes, note), seen_as=asdict(asked))


def _check_known(told: Sequence[tuple[str, Known | None]], choice: Quantization | str, said: str) -> None:
    """Refuse quantisations that cannot be reproduced, or that no file states."""
    for name, k in told:
        if k is not None and k.quantization is None:
            raise MergeError(
                f"{name} was trained on a base in {k.words}, which only its own library can reproduce. Save "
                f"the dequantised base (model.dequantize(), save_pretrained) and give that as base=, or quantized_base='original'."
            )
    if choice == "dequantize" and (unknown := [name for name, k in told if k is None]):
        raise MergeError(
            f"quantized_base='dequantize', but no file states how the base of {some(unknown)} was quantised, or whether it was"
            + (f" ({said})" if any(k is not None for _, k in told) else "")
            + ". Give how, quantized_base=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', ...), or leave it out."
        )


def _same(base: Checkpoint, shown: Checkpoint, asked: Quantization, other: Quantization) -> bool:
    """Whether two ways of quantising give the same weights: modules left out may be named in several ways."""
    if replace(asked, skip=None) != replace(other, skip=None):
        return False
    return {n for n, t in shown.tensors.items() if t.lens is not None} == set(linear_weights(base, other))
