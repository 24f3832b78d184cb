"""A PEFT LoRA adapter, read: what it adds to which weight of its base, and which tensors it replaces."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_continual.merging.checkpoints import Checkpoint
from hf_continual.merging.errors import MergeError
from hf_continual.merging.stored import Files, StoredTensor
from hf_continual.merging.structure import HEADS
from hf_continual.tensors.concatenate import scaling

_PREFIX = "base_model.model."
_PART = re.compile(
    r"^(?P<module>.*)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?P<rest>\.weight|\.bias)?$"
)
# Initialisations that take their factors out of the base's weights, and so change the base itself.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Options of LoraConfig under which the adapter is more than B A, each with its name for the message.
_NOT_LORA = {
    "alora_invocation_tokens": "acts only behind some tokens (aLoRA)",
    "arrow_config": "chooses among adapters by the input (Arrow)",
    "kasa_config": "has singular values of its own (KaSA)",
    "monteclora_config": "is random (MonteCLoRA)",
    "velora_config": "compresses activations (VeLoRA)",
    "use_qalora": "pools its input (QA-LoRA)",
    "use_bdlora": "is block diagonal (BD-LoRA)",
    "layer_replication": "repeats layers of the base",
    "target_parameters": "adapts parameters that are no module's weight (target_parameters)",
    "trainable_token_indices": "replaces rows of the embedding (trainable_token_indices)",
}


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one weight: ``scale * B A``, transposed where the weight is stored so.

    Args:
        a: Factor A, ``(rank, in)``; of an embedding ``(rank, vocabulary)``.
        b: Factor B, ``(out, rank)``.
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA, with the module's own rank and alpha.
        transposed: Whether the weight is ``(in, out)``: an embedding, or GPT-2's Conv1D.
        magnitude: DoRA's norm of each output, or None.
    """

    a: StoredTensor
    b: StoredTensor
    scale: float
    transposed: bool
    magnitude: StoredTensor | None = None

    @property
    def rank(self) -> int:
        """Columns of B."""
        return self.b.shape[1]

    def load(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """The product's factors in the weight's orientation: left ``(rows, rank)`` scaled, right ``(rank, columns)``."""
        with Files() as files:
            a, b = files.load(self.a).to(dtype), files.load(self.b).to(dtype)
        return (a.T.contiguous() * self.scale, b.T.contiguous()) if self.transposed else (b * self.scale, a)


@dataclass(frozen=True)
class Adapter:
    """An adapter's parts by the names of its base's tensors.

    Args:
        checkpoint: Where it is stored.
        factors: Name of a weight -> what is added to it.
        added: Name of a bias -> a vector that is added to it, and its scale (`lora_bias`).
        saved: Name of a tensor -> what replaces it (`modules_to_save`, trained biases, a resized embedding).
    """

    checkpoint: Checkpoint
    factors: Mapping[str, Factors]
    added: Mapping[str, tuple[StoredTensor, float]]
    saved: Mapping[str, StoredTensor]

    @property
    def is_plain(self) -> bool:
        """Whether it is a sum of low-rank products and full tensors, which add up in the form of an adapter."""
        return not self.added and all(f.magnitude is None for f in self.factors.values())


def read_adapter(checkpoint: Checkpoint, base: Checkpoint) -> Adapter:
    """Understand an adapter and match it with the model it is put on.

    Args:
        checkpoint: The adapter.
        base: The full model.

    Returns:
        Its parts.

    Raises:
        MergeError: If it is no LoRA adapter, one that is more than low-rank products, or does not fit the base.
    """
    check_lora(checkpoint)
    parts: dict[str, dict[str, StoredTensor]] = {}
    saved: dict[str, StoredTensor] = {}
    for key, tensor in checkpoint.tensors.items():
        name = key.removeprefix(_PREFIX)
        if found := _PART.match(name):
            kind = found["part"].replace("embedding_", "")
            kind += ".bias" if found["rest"] == ".bias" else ""
            parts.setdefault(found["module"], {})[kind] = tensor
        elif name.endswith(".base_layer.weight"):
            # PEFT stores an adapted embedding's own weights beside its adapter; they are news only if it was resized.
            target = _find(name.replace(".base_layer", ""), base, checkpoint)
            if base.tensors[target].shape != tensor.shape:
                saved[target] = tensor
        else:
            name = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            saved[_find(name, base, checkpoint, may_be_head=True)] = tensor
    factors: dict[str, Factors] = {}
    added = {}
    for module, own in parts.items():
        if "lora_A" not in own or "lora_B" not in own:
            raise MergeError(
                f"{checkpoint.name} has only {', '.join(own)} of {module!r}: it is incomplete. Save it again."
            )
        target = _find(f"{module}.weight", base, checkpoint, may_be_head=True)
        scale = scaling(dict(checkpoint.config), _PREFIX + module)
        embedding = "lora_embedding" in own["lora_A"].name
        shape = saved[target].shape if target in saved else _shape(base, target)
        factors[target] = _fitting(checkpoint, target, shape, own, scale, embedding)
        if "lora_B.bias" in own:
            added[_find(f"{module}.bias", base, checkpoint)] = (own["lora_B.bias"], scale)
    return Adapter(checkpoint, factors, added, saved)


def check_lora(checkpoint: Checkpoint) -> None:
    """Refuse what is no LoRA, or one whose weights alone do not say what it does.

    Args:
        checkpoint: The adapter.

    Raises:
        MergeError: With the option and a way out.
    """
    config, way = (
        checkpoint.config,
        "Put it into its base first (merge_and_unload, save_pretrained) and merge that model.",
    )
    kind = config.get("peft_type")
    if kind != "LORA":
        raise MergeError(f"{checkpoint.name} is a {kind} adapter; only LoRA adapters can be merged as such. {way}")
    for key, said in _NOT_LORA.items():
        if config.get(key):
            raise MergeError(f"{checkpoint.name} {said}: {key}={config[key]!r}. {way}")
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(_CHANGES_BASE):
        raise MergeError(
            f"{checkpoint.name} was initialised with {init!r}, which changed the base's weights: on the original base it is "
            f"wrong. Convert it (save_pretrained(..., path_initial_model_for_weight_conversion=...)), or: {way}"
        )


def _find(name: str, base: Checkpoint, adapter: Checkpoint, may_be_head: bool = False) -> str:
    """The base's name of an adapter's tensor; some base checkpoints leave the prefix of the inner model away."""
    for candidate in (name, name.partition(".")[2]):
        if candidate in base.tensors:
            return candidate
    if may_be_head and name in HEADS and base.config.get("tie_word_embeddings", True):
        return name  # a tied head is not stored; it is the embedding until the adapter changes it
    raise MergeError(
        f"{adapter.name} adapts {name!r}, and {base.name} has no such tensor (it has {next(iter(base.tensors))!r}, ...). The "
        f"adapter belongs to another base ({adapter.config.get('base_model_name_or_path')!r}), or the base stores its weights "
        f"under other names than the loaded model: load it and save_pretrained it first."
    )


def _shape(base: Checkpoint, name: str) -> tuple[int, ...] | None:
    return base.tensors[name].shape if name in base.tensors else None


def _fitting(
    checkpoint: Checkpoint,
    name: str,
    shape: tuple[int, ...] | None,
    own: Mapping[str, StoredTensor],
    scale: float,
    embedding: bool,
) -> Factors:
    a, b = own["lora_A"], own["lora_B"]
    out_in = (b.shape[0], a.shape[1]) if len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] else None
    straight = shape is None or (shape == out_in and not embedding)
    turned = out_in is not None and shape == out_in[::-1]
    if out_in is None or not (straight or turned):
        raise MergeError(
            f"{checkpoint.name}: factors A {list(a.shape)} and B {list(b.shape)} do not fit {name!r}, which is "
            f"{list(shape or ())} in the base. Give the base that it was trained on "
            f"({checkpoint.config.get('base_model_name_or_path')!r}); convolutions cannot be merged."
        )
    # A square weight leaves it open; the configuration says it.
    transposed = turned and (not straight or embedding or bool(checkpoint.config.get("fan_in_fan_out")))
    return Factors(a, b, scale, transposed, own.get("lora_magnitude_vector"))
