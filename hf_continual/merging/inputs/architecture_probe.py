"""How transformers and PEFT themselves read files: models are built on the meta device, without values.

Importing transformers takes seconds and memory that a merge does not need, so `hf_continual.merging.inputs.architecture` runs
this in a separate process if transformers is not loaded yet.
"""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from hf_continual import private
from hf_continual.merging.inputs.loaded_names import loaded_names
from hf_continual.merging.inputs.safetensors_file import DTYPES

# The attention implementation does not affect which weights exist, and may need a library or a download.
_IDLE = ("_attn_implementation", "_attn_implementation_internal", "attn_implementation", "quantization_config")


def probe(question: Mapping[str, Any]) -> dict[str, Any]:
    """Load a model without values, and apply adapters to it.

    Args:
        question: ``config`` of the model, its ``tensors`` (name -> dtype and shape), and ``adapters``: a list of
            ``config``, ``tensors`` and ``modules`` (whose weights have factors in its file).

    Returns:
        ``unknown`` or ``refused``: why the model could not be built, or None; ``missing``: tensors that loading would
        initialise at random; ``mismatched``: name, shape stored, shape needed; ``names``: name in the loaded model -> name in
        the file, where the two differ; ``transposed``: module -> whether its weight is
        stored ``(in, out)``; ``adapters``: for each, why PEFT would refuse it or could not be asked, and the factors
        that are ``missing`` or ``unexpected``.
    """
    answer: dict[str, Any] = {"unknown": None, "refused": None, "missing": [], "mismatched": [], "transposed": {}}
    answer |= {"names": {}, "adapters": []}
    with _quiet():
        try:
            model_class, config = _class_of(_with_numbers(question["config"]))
        except (KeyError, ImportError) as error:
            return {**answer, "unknown": str(error.args[0] if error.args else error)}
        except Exception as error:
            return {**answer, "refused": f"{type(error).__name__}: {error}"}
        stored = {
            name: torch.empty(shape, dtype=DTYPES[dtype], device="meta")
            for name, (dtype, shape) in question["tensors"].items()
        }
        try:
            model, info = model_class.from_pretrained(
                None, config=config, state_dict=stored, output_loading_info=True, device_map="meta",
                ignore_mismatched_sizes=True,
            )  # fmt: skip
        except ImportError as error:
            return {**answer, "unknown": str(error)}
        except Exception as error:
            return {**answer, "refused": f"{type(error).__name__}: {error}"}
        answer["missing"] = sorted(info["missing_keys"])
        answer["mismatched"] = sorted([n, list(have), list(want)] for n, have, want in info["mismatched_keys"])
        names = loaded_names(model, stored)
        answer["names"] = {loaded: name for name, loaded in names.items() if loaded != name}
        answer["transposed"] = _transposed(model, {m for a in question["adapters"] for m in a["modules"]})
        for adapter in question["adapters"]:
            with torch.device("meta"):
                fresh = model_class(config)
                _resize(fresh, adapter["tensors"])
            answer["adapters"].append(_put_on(fresh, adapter))
    return answer


def _with_numbers(told: Any) -> Any:
    """The data of a JSON file, with the numbers that JSON lacks: transformers writes infinity as ``{"__float__": "Infinity"}``."""
    if isinstance(told, Mapping):
        if list(told) == ["__float__"]:
            return float(told["__float__"])
        return {key: _with_numbers(value) for key, value in told.items()}
    return [_with_numbers(value) for value in told] if isinstance(told, list) else told


def understand(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Read configurations as transformers does, whichever version wrote them.

    Args:
        configs: What the files hold.

    Returns:
        For each ``unknown``: why transformers cannot read it, or None; ``meaning``: what its class reads, with all
        defaults; ``rest``: everything else.
    """
    with _quiet():
        return [_understood(_with_numbers(config)) for config in configs]


def _understood(config: dict[str, Any]) -> dict[str, Any]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    nothing: dict[str, Any] = {"meaning": {}, "rest": {}}
    if (kind := config.get("model_type")) not in CONFIG_MAPPING:
        return {**nothing, "unknown": f"the installed transformers does not know model_type={kind!r}"}
    try:
        read = CONFIG_MAPPING[kind].from_dict(copy.deepcopy({k: v for k, v in config.items() if k not in _IDLE}))
        meaning, rest = _meaning(read)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"[:300]
        return {**nothing, "unknown": f"the installed transformers cannot read one: {said}"}
    return json.loads(json.dumps({"unknown": None, "meaning": meaning, "rest": rest}, default=str))


def _meaning(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a configuration tells its model, and what else is in it."""
    from transformers import PreTrainedConfig

    whole = config.to_dict()
    read = {f.name for f in fields(config)} if is_dataclass(config) else set(whole)
    meaning = {k: v for k, v in whole.items() if k in read | {"head_dim"}}
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            meaning[key] = _meaning(value)[0]
        elif key == "rope_parameters" and isinstance(value, dict):
            meaning[key] = _rotation(value)
    heads = getattr(config, "num_attention_heads", None)
    # Without a size of its own, a model's class divides the width by the number of heads.
    width = getattr(config, "hidden_size", None)
    if meaning.get("head_dim") is None and isinstance(heads, int) and isinstance(width, int):
        meaning["head_dim"] = width // heads
    return meaning, {k: v for k, v in whole.items() if k not in meaning and v is not None}


def _rotation(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of rotary positions, without duplicates and values that have no effect."""
    told = {k: _rotation(v) if isinstance(v, dict) else v for k, v in parameters.items() if v is not None}
    if "rope_type" in told:
        told.pop("type", None)
    return told


def _class_of(config: dict[str, Any]) -> tuple[Any, Any]:
    """The class that a configuration names, and the configuration as transformers reads it.

    Args:
        config: What ``config.json`` holds.

    Returns:
        The class and the configuration.

    Raises:
        KeyError: If the installed transformers has no such model; code shipped with a model is never run.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, named = config.get("model_type"), (config.get("architectures") or [None])[0]
    if kind not in CONFIG_MAPPING:
        raise KeyError(f"the installed transformers does not know model_type={kind!r}")
    for key in _IDLE:
        config.pop(key, None)
    understood = CONFIG_MAPPING[kind].from_dict(config)
    if named is not None:
        found = getattr(transformers, str(named), None)
    else:
        found = private.class_for(transformers.AutoModelForCausalLM, understood)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise KeyError(f"the installed transformers has no architecture {named or kind!r}")
    return found, understood


def _transposed(model: torch.nn.Module, wanted: set[str]) -> dict[str, bool]:
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    return {n: isinstance(modules[n], Conv1D | torch.nn.Embedding) for n in sorted(wanted & modules.keys())}


def _resize(model: Any, tensors: Mapping[str, Any]) -> None:
    """Give a model the vocabulary of an adapter's file, as PEFT requires before it loads the adapter."""
    places = {id(module): name for name, module in model.named_modules()}
    endings = {
        "weight": 0,
        "base_layer.weight": 0,
        "modules_to_save.weight": 0,
        "lora_embedding_A": 1,
        "lora_B.weight": 0,
    }
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for ending, axis in endings.items() if module is not None else ():
            _, shape = tensors.get(f"base_model.model.{places[id(module)]}.{ending}", (None, ()))
            if len(shape) == 2 and shape[axis] != module.weight.shape[0]:
                return model.resize_token_embeddings(shape[axis], mean_resizing=False)


def _put_on(model: torch.nn.Module, adapter: Mapping[str, Any]) -> dict[str, Any]:
    """What PEFT would leave untrained, and what it would ignore, when it loads an adapter."""
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict

    told: dict[str, Any] = {"refused": None, "unknown": None, "missing": [], "unexpected": []}
    known = {f.name for f in fields(LoraConfig)} - {"peft_type", "task_type", "auto_mapping", "peft_version"}
    given = {k: v for k, v in adapter["config"].items() if k in known - {"runtime_config"}}
    # Some of these initialise factors from the weights, and there are none here.
    given |= {"init_lora_weights": True, "loftq_config": {}, "megatron_config": None}
    given |= dict.fromkeys(("eva_config", "corda_config", "lora_ga_config"))
    try:
        put = PeftModel(model, LoraConfig(**given), low_cpu_mem_usage=True)
    except Exception as error:
        return {**told, "refused": f"{type(error).__name__}: {error}"}
    factors = {
        n: torch.empty(shape, dtype=DTYPES[dtype], device="meta") for n, (dtype, shape) in adapter["tensors"].items()
    }
    try:
        result = set_peft_model_state_dict(put, factors, low_cpu_mem_usage=True, ignore_mismatched_sizes=True)
    except Exception as error:
        return {**told, "unknown": f"{type(error).__name__}: {error}"}
    for kind, names in (("missing", result.missing_keys), ("unexpected", result.unexpected_keys)):
        told[kind] = sorted(n.replace(".default", "") for n in names if ".lora_" in n)
    return told


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence reports, progress bars and warnings of the libraries, and draw no random number from the user's generator."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
