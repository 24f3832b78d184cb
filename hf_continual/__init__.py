"""Fine-tune a language model again and again without losing what it knows.

`ContinualTrainer` is TRL's SFTTrainer plus methods against forgetting; change one line and add them:

    trainer = ContinualTrainer(model, ContinualConfig("out"), train_dataset=task, methods=[Replay(old, ratio=0.1)])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_continual.versions import VERSION, check_versions

if TYPE_CHECKING:
    from hf_continual.data.collator import ReplayCollator
    from hf_continual.data.replay import ReplayRows
    from hf_continual.hub.card import render_card
    from hf_continual.hub.errors import HubPushError
    from hf_continual.hub.push import push_to_hub
    from hf_continual.inference.loading import load_moe_lora, load_prompt_pool, load_sapt_lora
    from hf_continual.merging.merge import merge
    from hf_continual.merging.methods.dare import dare, dare_ties
    from hf_continual.merging.methods.interpolate import interpolate, scan_alpha
    from hf_continual.merging.methods.kif.fuse import kif_fuse
    from hf_continual.merging.methods.linear import merge_linear
    from hf_continual.merging.methods.magnitude_max import magnitude_max
    from hf_continual.merging.methods.recall.merge import merge_with_recall
    from hf_continual.merging.methods.slerp import slerp
    from hf_continual.merging.methods.task_arithmetic import task_arithmetic
    from hf_continual.merging.methods.ties import ties
    from hf_continual.methods.base import Forward, Method, OptimizerChoice, Run
    from hf_continual.methods.entropy_weighted import EntropyWeighted
    from hf_continual.methods.ewc import EWC
    from hf_continual.methods.freeze import FreezeLayers
    from hf_continual.methods.gere import GeRe
    from hf_continual.methods.gradient_projection import GradientProjection
    from hf_continual.methods.kif import KIF
    from hf_continual.methods.kl_to_base import KLToBase
    from hf_continual.methods.l2p import L2P
    from hf_continual.methods.lamol import LAMOL
    from hf_continual.methods.lfpt5 import LFPT5
    from hf_continual.methods.mask_surprising import MaskSurprising
    from hf_continual.methods.migu import MIGU
    from hf_continual.methods.moe_lora import MoELoRA
    from hf_continual.methods.mofo import MoFO
    from hf_continual.methods.o_lora import OLoRA
    from hf_continual.methods.on_policy_replay import OnPolicyReplay
    from hf_continual.methods.osft import OSFT
    from hf_continual.methods.recadam import RecAdam
    from hf_continual.methods.replay import Replay
    from hf_continual.methods.sapt_lora import SAPTLoRA
    from hf_continual.methods.slao import SLAO
    from hf_continual.methods.slow_weights import SlowWeights
    from hf_continual.methods.task_vector import TaskVector
    from hf_continual.methods.tasl import TaSL
    from hf_continual.methods.vrmcl import VRMCL
    from hf_continual.metrics import AccuracyMatrix
    from hf_continual.paper import Paper
    from hf_continual.stopping import Stopped
    from hf_continual.stream.train import train_stream
    from hf_continual.tasks import Task, TaskStream
    from hf_continual.trainer.any_trainer import ContinualMixin
    from hf_continual.trainer.callback import ContinualCallback
    from hf_continual.trainer.config import ContinualConfig
    from hf_continual.trainer.trainer import ContinualTrainer

__version__ = VERSION

check_versions()

# The public names, in the order of the data flow. A name is imported on first use: `import hf_continual` loads no
# torch.
_FACE = {
    "Task": "hf_continual.tasks",
    "TaskStream": "hf_continual.tasks",
    "train_stream": "hf_continual.stream.train",
    "ContinualTrainer": "hf_continual.trainer.trainer",
    "ContinualConfig": "hf_continual.trainer.config",
    "ContinualCallback": "hf_continual.trainer.callback",
    "ContinualMixin": "hf_continual.trainer.any_trainer",
    "Stopped": "hf_continual.stopping",
    "Method": "hf_continual.methods.base",
    "Forward": "hf_continual.methods.base",
    "Run": "hf_continual.methods.base",
    "OptimizerChoice": "hf_continual.methods.base",
    "Paper": "hf_continual.paper",
    "ReplayRows": "hf_continual.data.replay",
    "ReplayCollator": "hf_continual.data.collator",
    "Replay": "hf_continual.methods.replay",
    "GeRe": "hf_continual.methods.gere",
    "FreezeLayers": "hf_continual.methods.freeze",
    "KIF": "hf_continual.methods.kif",
    "RecAdam": "hf_continual.methods.recadam",
    "EWC": "hf_continual.methods.ewc",
    "OLoRA": "hf_continual.methods.o_lora",
    "MIGU": "hf_continual.methods.migu",
    "TaSL": "hf_continual.methods.tasl",
    "GradientProjection": "hf_continual.methods.gradient_projection",
    "TaskVector": "hf_continual.methods.task_vector",
    "L2P": "hf_continual.methods.l2p",
    "MoELoRA": "hf_continual.methods.moe_lora",
    "SAPTLoRA": "hf_continual.methods.sapt_lora",
    "load_prompt_pool": "hf_continual.inference.loading",
    "load_moe_lora": "hf_continual.inference.loading",
    "load_sapt_lora": "hf_continual.inference.loading",
    "LAMOL": "hf_continual.methods.lamol",
    "LFPT5": "hf_continual.methods.lfpt5",
    "VRMCL": "hf_continual.methods.vrmcl",
    "MaskSurprising": "hf_continual.methods.mask_surprising",
    "EntropyWeighted": "hf_continual.methods.entropy_weighted",
    "KLToBase": "hf_continual.methods.kl_to_base",
    "OnPolicyReplay": "hf_continual.methods.on_policy_replay",
    "MoFO": "hf_continual.methods.mofo",
    "OSFT": "hf_continual.methods.osft",
    "SLAO": "hf_continual.methods.slao",
    "SlowWeights": "hf_continual.methods.slow_weights",
    "AccuracyMatrix": "hf_continual.metrics",
    "push_to_hub": "hf_continual.hub.push",
    "render_card": "hf_continual.hub.card",
    "HubPushError": "hf_continual.hub.errors",
    "merge": "hf_continual.merging.merge",
    "merge_with_recall": "hf_continual.merging.methods.recall.merge",
    "merge_linear": "hf_continual.merging.methods.linear",
    "interpolate": "hf_continual.merging.methods.interpolate",
    "scan_alpha": "hf_continual.merging.methods.interpolate",
    "task_arithmetic": "hf_continual.merging.methods.task_arithmetic",
    "ties": "hf_continual.merging.methods.ties",
    "dare": "hf_continual.merging.methods.dare",
    "dare_ties": "hf_continual.merging.methods.dare",
    "slerp": "hf_continual.merging.methods.slerp",
    "magnitude_max": "hf_continual.merging.methods.magnitude_max",
    "kif_fuse": "hf_continual.merging.methods.kif.fuse",
}

__all__ = [  # noqa: RUF022 - in the order of the data
    "Task",
    "TaskStream",
    "train_stream",
    "ContinualTrainer",
    "ContinualConfig",
    "ContinualCallback",
    "ContinualMixin",
    "Stopped",
    "Method",
    "Forward",
    "Run",
    "OptimizerChoice",
    "Paper",
    "ReplayRows",
    "ReplayCollator",
    "Replay",
    "GeRe",
    "FreezeLayers",
    "KIF",
    "RecAdam",
    "EWC",
    "OLoRA",
    "MIGU",
    "TaSL",
    "GradientProjection",
    "TaskVector",
    "L2P",
    "MoELoRA",
    "SAPTLoRA",
    "load_prompt_pool",
    "load_moe_lora",
    "load_sapt_lora",
    "LAMOL",
    "LFPT5",
    "VRMCL",
    "MaskSurprising",
    "EntropyWeighted",
    "KLToBase",
    "OnPolicyReplay",
    "MoFO",
    "OSFT",
    "SLAO",
    "SlowWeights",
    "AccuracyMatrix",
    "push_to_hub",
    "render_card",
    "HubPushError",
    "merge",
    "merge_with_recall",
    "merge_linear",
    "interpolate",
    "scan_alpha",
    "task_arithmetic",
    "ties",
    "dare",
    "dare_ties",
    "slerp",
    "magnitude_max",
    "kif_fuse",
]


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module 'hf_continual' has no attribute {name!r}; it offers {', '.join(_FACE)}")
    found = getattr(importlib.import_module(_FACE[name]), name)
    globals()[name] = found  # looked up once
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
