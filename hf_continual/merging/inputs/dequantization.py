"""A stored base as bitsandbytes presents it to an adapter: every linear weight quantised and back, while it is read.

4 bits: blocks of 64 elements of the flattened weight, each with its largest magnitude as scale; with double quantisation
the scales of the whole weight are quantised too, in blocks of 256 around their mean. 8 bits: rows, in fp16. So a weight's
scales are found in one pass over it, and after that any range of it can be read alone. A weight is read twice and never in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_continual.merging.errors import MergeError, some
from hf_continual.merging.inputs.quantization import (
    Quantization,
)
from hf_continual.merging.inputs.safetensors_file import DTYPES, Files, StoredTensor, view

if TYPE_CHECKING:
    from hf_continual.merging.inputs.checkpoint import Checkpoint

BLOCK, SCALES_BLOCK = 64, 256  # bitsandbytes' sizes, which transformers does not change
_PASS = 2**18  # elements of the pass that finds the scales; a multiple of BLOCK
PASS_BYTES = 44  # per element, measured: bitsandbytes' copies in fp32, and codes of four bytes each


@dataclass(frozen=True)
class Lens:
    """What reading a weight returns instead of its bytes.

    Args:
        whole: The weight.
        quantization: How it is quantised.
    """

    whole: StoredTensor
    quantization: Quantization

    def read_into(self, files: Files, tensor: StoredTensor, start: int, stop: int, buffer: memoryview) -> None:
        """As `Files.read_into`, for the weight or rows of it."""
        whole = self.whole
        if self not in files.kept:
            files.kept.clear()  # tensors are read one after another
            files.kept[self] = self.scales(files)
        scales = files.kept[self]
        before = (tensor.offset - whole.offset) // whole.itemsize
        first, last = before + start, before + stop
        # to the boundaries of blocks or rows
        step = BLOCK if self.quantization.kind != "int8" else whole.shape[-1]
        begin, end = first // step * step, min(-(-last // step) * step, whole.numel)
        values = self._seen(_load(files, whole, begin, end), scales[begin // step : -(-end // step)])
        buffer[:] = view(values[first - begin : last - begin].contiguous().view(torch.uint8))

    def memory(self, elements: int) -> int:
        """Upper bound on the bytes for reading so many elements at a time: a pass, and several copies of every block's scale."""
        numbers = self.whole.numel // (BLOCK if self.quantization.kind != "int8" else self.whole.shape[-1])
        return max(elements, _PASS) * PASS_BYTES + numbers * 4 * 4

    def scales(self, files: Files) -> Tensor:
        """The scales as the adapter's base had them, float32: one per block, or per row in 8 bits."""
        found, whole = [], self.whole
        step = _PASS if self.quantization.kind != "int8" else max(1, _PASS // whole.shape[-1]) * whole.shape[-1]
        for start in range(0, whole.numel, step):
            values = self._typed(_load(files, whole, start, min(start + step, whole.numel)))
            if self.quantization.kind == "int8":
                found.append(values.half().view(-1, whole.shape[-1]).abs().amax(1).float())
            else:
                padded = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
                found.append(torch.stack((padded.amax(1), -padded.amin(1))).amax(0).float())
        scales = torch.cat(found)
        if self.quantization.double:
            functional = _bitsandbytes()
            mean = scales.mean()
            codes, state = functional.quantize_blockwise(scales - mean, blocksize=SCALES_BLOCK)
            scales = functional.dequantize_blockwise(codes, state) + mean
        return scales

    def _typed(self, values: Tensor) -> Tensor:
        return values if self.quantization.dtype is None else values.to(getattr(torch, self.quantization.dtype))

    def _seen(self, stored: Tensor, scales: Tensor) -> Tensor:
        functional, values = _bitsandbytes(), self._typed(stored)
        if self.quantization.kind == "int8":
            codes, _, _ = functional.int8_vectorwise_quant(values.half().view(-1, self.whole.shape[-1]))
            return functional.int8_vectorwise_dequant(codes, scales).flatten().to(values.dtype).to(stored.dtype)
        codes, state = functional.quantize_4bit(values, blocksize=BLOCK, quant_type=self.quantization.kind)
        state.absmax = scales.contiguous()
        return functional.dequantize_4bit(codes, state).flatten().to(stored.dtype)


def _load(files: Files, tensor: StoredTensor, start: int, stop: int) -> Tensor:
    raw = torch.empty((stop - start) * tensor.itemsize, dtype=torch.uint8)
    files.read_into(tensor, start, stop, view(raw))
    return raw.view(DTYPES[tensor.dtype])


def _bitsandbytes() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise MergeError(
            "the values that an adapter saw of a 4- or 8-bit base are computed by bitsandbytes, which is not installed: pip install "
            "'hf-continual[bnb]', or quantized_base='original'."
        ) from error
    return functional


def dequantized(base: Checkpoint, quantization: Quantization) -> Checkpoint:
    """A base whose linear weights are read as an adapter's training saw them.

    Args:
        base: The base.
        quantization: How it was quantised.

    Returns:
        The base; nothing is read yet.

    Raises:
        MergeError: If bitsandbytes is missing, or a weight is stored in a way that is quantised differently.
    """
    _bitsandbytes()
    names = linear_weights(base, quantization)
    tensors = dict(base.tensors)
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in ("BF16", "F16", "F32") and quantization.dtype is None:
            raise MergeError(
                f"{name!r} of {base.name} is {tensor.dtype}, which bitsandbytes does not quantise. Give a base in bfloat16, "
                f"float16 or float32, 'dtype' in quantized_base, or quantized_base='original'."
            )
        tensors[name] = replace(tensor, lens=Lens(tensor, quantization))
    return replace(base, tensors=tensors)


@torch.no_grad()
def put_into(model: torch.nn.Module, base: Checkpoint) -> None:
    """Load the weights into a model as they are read from its checkpoint.

    Args:
        model: The model of `base`, its weights in memory.
        base: What `dequantized` returned.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in base.tensors.items():
        if tensor.lens is not None:
            # some checkpoints omit the prefix of the inner model
            target = next(p for n, p in parameters.items() if n == name or n.endswith(f".{name}"))
            with Files() as files:
                target.copy_(files.load(tensor))


def linear_weights(base: Checkpoint, quantization: Quantization) -> list[str]:
    """The stored weights that transformers quantises: it builds the model without weights and replaces its layers.

    Args:
        base: The base.
        quantization: How it is quantised.

    Returns:
        Names of stored tensors.

    Raises:
        MergeError: If one is stored transposed (GPT-2's Conv1D) or under another name than in the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.auto import AutoHfQuantizer

    skip = None if quantization.skip is None else list(quantization.skip)
    options: dict[str, Any] = (
        {"load_in_8bit": True}
        if quantization.kind == "int8"
        else {"load_in_4bit": True, "bnb_4bit_quant_type": quantization.kind}
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.folder))
    quantizer = AutoHfQuantizer.from_config(
        BitsAndBytesConfig(**options, llm_int8_skip_modules=skip), pre_quantized=False
    )
    quantizer.preprocess_model(model=model, device_map=None)
    found, lacking = [], []
    for name, module in model.named_modules():
        source = getattr(module, "source_cls", None)
        if source is None:
            continue
        if issubclass(source, Conv1D):
            raise MergeError(
                f"{name!r} of {base.name} is stored transposed (Conv1D) and is quantised in the other orientation, which is not "
                f"supported here. Save the dequantised base (model.dequantize(), save_pretrained) and give that as base=."
            )
        stored = next((n for n in (f"{name}.weight", f"{name.partition('.')[2]}.weight") if n in base.tensors), None)
        lacking.append(name) if stored is None else found.append(stored)
    if lacking or not found:
        raise MergeError(
            f"{base.name} does not store {some(lacking) or 'any linear layer'} as the loaded model has it, so it is not known "
            f"what is quantised. Load the base and save it with save_pretrained, or quantized_base='original'."
        )
    return found
