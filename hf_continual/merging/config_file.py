"""Read a merge from a file: this library's own keys, or mergekit's for the methods that both have.

A mergekit setting that means something else here is refused with an explanation, never approximated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_continual.merging.errors import MergeError
from hf_continual.named import did_you_mean

OWN = ("method", "models", "base", "out")
THEIRS = (
    "merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source", "chat_template", "slices",
    "name", "tokenizer",
)  # fmt: skip
# mergekit's name -> ours, and the option that takes the `weight` of each model.
METHODS = {
    "linear": ("linear", "weights"),
    "task_arithmetic": ("task_arithmetic", "scale"),
    "ties": ("ties", None),
    "dare_linear": ("dare", "scale"),
    "dare_ties": ("dare_ties", None),
    "breadcrumbs": ("breadcrumbs", "scale"),
    "slerp": ("slerp", None),
    "model_stock": ("model_stock", None),
}


@dataclass(frozen=True)
class MergeFile:
    """A merge, as a file describes it.

    Args:
        method: Name of the merge.
        models: Folders or Hub ids, oldest first.
        base: The base, or None.
        out: Output folder, or None if the file names none.
        options: Options of the method and of the output.
    """

    method: str
    models: tuple[str, ...]
    base: str | None
    out: str | None
    options: dict[str, Any]


def read_merge_file(file: Path) -> MergeFile:
    """Read a merge from YAML.

    Args:
        file: The file.

    Returns:
        The merge that it describes.

    Raises:
        FileNotFoundError: If it does not exist.
        MergeError: If it cannot be read, or asks for something that is not supported.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist (looked in {Path.cwd()}).")
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MergeError(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(data, Mapping):
        raise MergeError(f"{file} holds {type(data).__name__}, expected a mapping with the keys {', '.join(OWN)}.")
    try:
        return _theirs(dict(data)) if "merge_method" in data else _own(dict(data))
    except (ValueError, TypeError) as error:
        raise MergeError(f"{file}: {error}") from error


def _own(data: dict[str, Any]) -> MergeFile:
    if missing := [key for key in ("method", "models") if key not in data]:
        raise ValueError(f"the key {missing[0]!r} is missing.{did_you_mean(missing[0], data)}")
    models = data.pop("models")
    if not isinstance(models, list) or not all(isinstance(m, str) for m in models):
        raise ValueError(f"models={models!r}: give a list of folders or Hub ids.")
    method, base, out = data.pop("method"), data.pop("base", None), data.pop("out", None)
    return MergeFile(str(method), tuple(models), base, out, data)


def _theirs(data: dict[str, Any]) -> MergeFile:
    if unknown := [k for k in data if k not in THEIRS]:
        raise ValueError(f"unknown key {unknown[0]!r}.{did_you_mean(unknown[0], THEIRS)}")
    name = str(data["merge_method"])
    if name not in METHODS:
        raise ValueError(
            f"merge_method={name!r} is not a method that mergekit and this library share: {', '.join(METHODS)}."
        )
    if data.get("slices") is not None:
        raise ValueError(
            "`slices` builds a model from the layers of several, which is not supported here. List whole `models`."
        )
    for key in ("tokenizer_source", "tokenizer"):
        if data.get(key) not in (None, "base"):
            raise ValueError(
                f"{key}={data[key]!r}: the tokenizer is always the newest model's, or the longest with vocab=extend. Leave this key out."
            )
    entries = [_entry(e) for e in data.get("models") or ()]
    base = data.get("base_model")
    # mergekit lists the base among the models, without parameters.
    entries = [(m, p) for m, p in entries if not (m == base and name not in ("linear", "slerp"))]
    return _translated(name, entries, base, dict(data.get("parameters") or {}), data)


def _entry(entry: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(entry, Mapping) or "model" not in entry:
        raise ValueError(f"an entry of models is {entry!r}; it needs the key 'model'.")
    if strange := [k for k in entry if k not in ("model", "parameters")]:
        raise ValueError(f"the model {entry['model']!r} has the unknown key {strange[0]!r}.")
    return str(entry["model"]), dict(entry.get("parameters") or {})


def _translated(
    name: str, entries: Sequence[tuple[str, dict[str, Any]]], base: Any, shared: dict[str, Any], data: Mapping[str, Any]
) -> MergeFile:
    method, weights_to = METHODS[name]
    options: dict[str, Any] = {}
    weights = [_number(m, "weight", p.pop("weight", shared.get("weight", 1.0))) for m, p in entries]
    shared.pop("weight", None)
    factor = _number("parameters", "lambda", shared.pop("lambda", 1.0))
    normalize = shared.pop("normalize", name in ("linear", "ties"))
    if weights_to == "weights":
        if not normalize:
            raise ValueError(
                "normalize=false makes a linear merge a sum, not an average: use task_arithmetic with a base."
            )
        options["weights"] = weights
    elif weights_to == "scale":
        total = sum(weights)
        options["scale"] = [factor * w / (total if normalize and total else 1.0) for w in weights]
    elif method in ("ties", "dare_ties"):
        _check_mean(name, weights, bool(normalize))
        options["scale"] = factor
    options |= _shares(name, method, entries, shared)
    if method == "slerp":
        options["t"] = _number("parameters", "t", shared.pop("t", None))
    if left := {**shared, **{k: v for _, p in entries for k, v in p.items()}}:
        key, value = next(iter(left.items()))
        raise ValueError(f"the parameter {key}={value!r} of {name} has no counterpart here.")
    if kind := data.get("out_dtype") or data.get("dtype"):
        options["dtype"] = str(kind)
    models = [m for m, _ in entries]
    if method == "slerp" and base is not None:  # the base is the first of the two
        models = [str(base), *[m for m in models if m != base]]
        base = None
    return MergeFile(method, tuple(models), None if base is None else str(base), None, options)


def _shares(
    name: str, method: str, entries: Sequence[tuple[str, dict[str, Any]]], shared: dict[str, Any]
) -> dict[str, Any]:
    """`density`, and `gamma` of breadcrumbs: one number for all models."""
    found: dict[str, Any] = {}
    for theirs, ours in (("density", "density"), ("gamma", "outliers")):
        if method not in ("ties", "dare", "dare_ties", "breadcrumbs"):
            continue
        default = shared.pop(theirs, None)
        values = {_number(m, theirs, p.pop(theirs, default)) for m, p in entries if theirs in p or default is not None}
        if len(values) > 1:
            raise ValueError(
                f"{theirs} differs between the models ({sorted(values)}); {name} takes one value for all here."
            )
        if values and (theirs != "gamma" or method == "breadcrumbs"):
            found[ours] = values.pop()
    if method in ("dare", "dare_ties") and not shared.pop("rescale", True):
        raise ValueError(f"rescale=false of {name}: kept changes are always rescaled here, as in the paper.")
    if method in ("ties", "dare", "dare_ties") and "density" not in found:
        found["density"] = 1.0  # mergekit's default keeps all
    return found


def _check_mean(name: str, weights: Sequence[float], normalize: bool) -> None:
    if len(set(weights)) > 1:
        raise ValueError(
            f"the weights of {name} are {list(weights)}; here the models have one vote each, as in the paper."
        )
    if not normalize:
        raise ValueError(
            f"{name} without normalize=true adds up the changes that agree; here they are averaged, as in the paper. Set normalize: true, or "
            f"use dare_linear."
        )


def _number(where: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key}={value!r} of {where}: only one number for all tensors is supported here.")
    return float(value)
