"""Check that an adapter's configuration is plain LoRA, fully described by its low-rank factors, with valid numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hf_continual.merging.errors import MergeError
from hf_continual.merging.inputs.checkpoint import ADAPTER_CONFIG, Checkpoint

WAY_OUT = "Merge it into its base first (merge_and_unload, save_pretrained) and merge that model."
# Initialisations that take their factors out of the base's weights, and so change the base itself.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Options of LoraConfig under which the adapter is more than B A, each with its name for the message.
_NOT_LORA = {
    "alora_invocation_tokens": "acts only after some tokens (aLoRA)",
    "arrow_config": "chooses among adapters by the input (Arrow)",
    "kasa_config": "has singular values of its own (KaSA)",
    "monteclora_config": "is random (MonteCLoRA)",
    "velora_config": "compresses activations (VeLoRA)",
    "use_qalora": "pools its input (QA-LoRA)",
    "use_bdlora": "is block diagonal (BD-LoRA)",
    "layer_replication": "repeats layers of the base",
    "target_parameters": "adapts parameters that are not a module's weight (target_parameters)",
    "trainable_token_indices": "replaces rows of the embedding (trainable_token_indices)",
}
# Options that a merge reads, or that PEFT is asked about with the adapter's file.
_READ = (
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_dora", "lora_bias",
    "bias", "modules_to_save", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "ensure_weight_tying", "init_lora_weights",
)  # fmt: skip
# Options that have no effect once an adapter is trained: where it comes from, how it was initialised and trained.
_TRAINING_ONLY = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config", "megatron_core",
    "qalora_group_size", "runtime_config",
)  # fmt: skip
KNOWN_OPTIONS = frozenset((*_NOT_LORA, *_READ, *_TRAINING_ONLY))


def check_options(adapter: Checkpoint) -> list[str]:
    """Refuse adapters that are not LoRA or are more than their factors, and numbers that PEFT refuses too.

    Args:
        adapter: The adapter.

    Returns:
        Notes on options that are not known here and were ignored.

    Raises:
        MergeError: With the option and a way out.
    """
    config = adapter.config
    kind = config.get("peft_type")
    if kind != "LORA":
        raise MergeError(f"{adapter.name} is a {kind} adapter; only LoRA adapters can be merged as such. {WAY_OUT}")
    for key, said in _NOT_LORA.items():
        if config.get(key):
            raise MergeError(f"{adapter.name} {said}: {key}={config[key]!r}. {WAY_OUT}")
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(_CHANGES_BASE):
        raise MergeError(
            f"{adapter.name} was initialised with {init!r}, which changed the base's weights: on the original base it is "
            f"wrong. Convert it (save_pretrained(..., path_initial_model_for_weight_conversion=...)), or: {WAY_OUT}"
        )
    check_numbers(adapter)
    return _unknown(adapter)


def _unknown(adapter: Checkpoint) -> list[str]:
    """Handle options of another PEFT version: refuse one that is switched on; a number or a word may be a default."""
    strange = {k: v for k, v in adapter.config.items() if k not in KNOWN_OPTIONS and v}
    version = adapter.config.get("peft_version")
    for key, value in strange.items():
        if value is True or isinstance(value, Mapping | list):
            raise MergeError(
                f"{adapter.name} was saved by PEFT {version} with {key}={value!r}, an option that is not known here: its "
                f"factors may mean something else. With that PEFT: {WAY_OUT[0].lower()}{WAY_OUT[1:]}"
            )
    if not strange:
        return []
    told = ", ".join(f"{k}={v!r}" for k, v in strange.items())
    return [f"{adapter.name} was saved by PEFT {version} with {told}, which is not known here and was ignored."]


def check_numbers(adapter: Checkpoint) -> None:
    """Refuse invalid ranks, scales and patterns.

    Args:
        adapter: The adapter.

    Raises:
        MergeError: With the option, its value and what it must be.
    """
    config = adapter.config
    _check_value(adapter, "r", config.get("r"), _is_rank)
    _check_value(adapter, "lora_alpha", config.get("lora_alpha"), _is_number)
    for key, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        patterns = config.get(key) or {}
        if not isinstance(patterns, Mapping):
            raise _impossible(adapter, key, patterns, "an object, from a pattern of module names to a number")
        for pattern, value in patterns.items():
            _check_pattern(adapter, key, pattern)
            _check_value(adapter, f"{key}[{pattern!r}]", value, fits)
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        value = config.get(key)
        if isinstance(value, str) and key != "modules_to_save":
            _check_pattern(adapter, key, value)
        elif value is not None and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise _impossible(adapter, key, value, "a list of names")
    if (bias := config.get("bias", "none")) not in ("none", "all", "lora_only"):
        raise _impossible(adapter, "bias", bias, "'none', 'all' or 'lora_only'")


def _is_rank(value: Any) -> str | None:
    return None if type(value) is int and value > 0 else "a whole number above 0"


def _is_number(value: Any) -> str | None:
    return None if type(value) in (int, float) and abs(value) < 1e308 else "a finite number"


def _check_value(adapter: Checkpoint, key: str, value: Any, fits: Any) -> None:
    if (wanted := fits(value)) is not None:
        raise _impossible(adapter, key, value, wanted)


def _check_pattern(adapter: Checkpoint, key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise _impossible(adapter, key, pattern, f"a regular expression ({error})") from error


def _impossible(adapter: Checkpoint, key: str, value: Any, wanted: str) -> MergeError:
    shown = repr(value) if len(repr(value)) < 200 else f"{repr(value)[:200]}..."
    return MergeError(
        f"{ADAPTER_CONFIG} of {adapter.name} says {key}={shown}; it must be {wanted}. Restore the file as PEFT wrote it."
    )
