"""For tests only: lets accelerate enter its FSDP branch on a CPU with gloo.

With `use_cpu=True` accelerate picks MULTI_CPU and silently ignores the FSDP plugin, so plain DDP would be tested.
Here the backend is gloo and the type MULTI_GPU while every tensor stays on the CPU.
"""

from __future__ import annotations

import os

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

import transformers.training_args
from accelerate import state
from accelerate.utils import DistributedType


def _backend(self, cpu=False, sagemaker_dp=False, backend=None):
    if int(os.environ.get("LOCAL_RANK", -1)) == -1:
        return None, DistributedType.NO
    return "gloo", DistributedType.MULTI_GPU


state.PartialState._prepare_backend = _backend
transformers.training_args.is_torch_bf16_gpu_available = lambda: True
