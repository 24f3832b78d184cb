"""The rules of the Hub for a card's metadata, checked without the Hub."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from hf_continual.hub.licences import hub_licenses
from hf_continual.hub.refs import is_hub_id

RELATIONS = ("adapter", "merge", "quantized", "finetune")
_LANGUAGE = re.compile(r"[a-z]{2,3}")
_LISTS = ("datasets", "metrics", "tags", "buckets", "language", "base_model")
Rule = tuple[str, str]


def check_metadata(data: Mapping[str, Any]) -> Iterator[Rule]:
    """Find everything that the Hub refuses or misreads.

    Args:
        data: A card's metadata.

    Yields:
        Rule: Name of a rule, and the violation.
    """
    for key in _LISTS:
        value = data.get(key)
        if (
            value is not None
            and not isinstance(value, list)
            and not (key in ("language", "base_model", "datasets", "metrics") and isinstance(value, str))
        ):
            yield key, f"{key} must be a list of strings, but is {value!r}."
        for item in value if isinstance(value, list) else []:
            if not isinstance(item, str) or not item.strip():
                yield key, f"{key} holds {item!r}, which is not a name. Remove it."
    yield from _ids(data)
    yield from _relation(data)
    yield from _license(data)
    for code in _list(data.get("language")):
        if isinstance(code, str) and not _LANGUAGE.fullmatch(code) and code not in ("code", "multilingual"):
            yield "language", f"{code!r} is not a lower-case ISO 639 code such as 'en'; the Hub refuses it."
    yield from _index(data.get("model-index"))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _ids(data: Mapping[str, Any]) -> Iterator[Rule]:
    for key in ("base_model", "datasets", "new_version"):
        for item in _list(data.get(key)):
            if isinstance(item, str) and item.strip() and not is_hub_id(item):
                yield (
                    key,
                    f"{key} holds {item!r}, which is not a valid Hub id such as 'me/model'; the Hub refuses it. Name the published one, or leave it out.",
                )
    bases = _list(data.get("base_model"))
    for item in {b for b in bases if isinstance(b, str) and bases.count(b) > 1}:
        yield "base_model", f"base_model names {item!r} twice."


def _relation(data: Mapping[str, Any]) -> Iterator[Rule]:
    relation, bases = data.get("base_model_relation"), _list(data.get("base_model"))
    if relation is None:
        if bases:
            yield "relation", f"base_model_relation is missing, so the Hub guesses. Use one of {', '.join(RELATIONS)}."
        return
    if relation not in RELATIONS:
        yield "relation", f"base_model_relation={relation!r} is not one of {', '.join(RELATIONS)}."
    if not bases:
        yield "relation", f"base_model_relation={relation!r} without a base_model. Name the base."
    if len(bases) > 1 and relation != "merge":
        yield "relation", f"{len(bases)} base models and base_model_relation={relation!r}: several bases mean a merge."
    library = data.get("library_name")
    if relation == "adapter" and library not in (None, "peft"):
        yield "relation", f"an adapter with library_name={library!r}; an adapter is loaded by peft."
    if relation in ("merge", "finetune") and library == "peft":
        yield "relation", f"library_name='peft' with base_model_relation={relation!r}; a peft repository is an adapter."


def _license(data: Mapping[str, Any]) -> Iterator[Rule]:
    found = data.get("license")
    if "licence" in data:
        yield "license", "the key is 'license'; 'licence' is not read."
    for item in _list(found):
        if item not in hub_licenses():
            yield (
                "license",
                f"license {item!r} is not in the Hub's list. Use an id from it, or 'other' with license_name and license_link.",
            )
    if found == "other" and not data.get("license_name"):
        yield "license", "license 'other' needs license_name and license_link."


def _index(index: Any) -> Iterator[Rule]:
    if index is None:
        return
    if not isinstance(index, list) or not index:
        yield "model-index", "model-index must be a list of models with results. Leave it out if nothing was measured."
        return
    for model in index:
        if (
            not isinstance(model, dict)
            or not isinstance(model.get("name"), str)
            or not isinstance(model.get("results"), list)
        ):
            yield "model-index", f"an entry needs a name and a list of results, but is {str(model)[:80]}."
            continue
        for result in model["results"]:
            yield from _result(result)


def _result(result: Any) -> Iterator[Rule]:
    if not isinstance(result, dict):
        yield "model-index", f"a result is {result!r}, but must be a mapping."
        return
    task, dataset, metrics = result.get("task"), result.get("dataset"), result.get("metrics")
    if not isinstance(task, dict) or not isinstance(task.get("type"), str):
        yield "model-index", "a result lacks task.type."
    if not isinstance(dataset, dict):
        yield "model-index", "a result lacks its dataset."
        dataset = {}
    for key in ("type", "name"):
        if not isinstance(dataset.get(key), str):
            yield "model-index", f"a result lacks dataset.{key}."
    for key in ("config", "split", "revision"):
        if key in dataset and not isinstance(dataset[key], str):
            yield "model-index", f"dataset.{key} is {dataset[key]!r}, but must be a string."
    if not isinstance(metrics, list) or not metrics:
        yield "model-index", f"the result on {dataset.get('name')!r} has no metrics."
        return
    for metric in metrics:
        value = metric.get("value") if isinstance(metric, dict) else None
        if not isinstance(metric, dict) or not isinstance(metric.get("type"), str) or value is None:
            yield "model-index", f"a metric of {dataset.get('name')!r} lacks its type or value."
        elif isinstance(value, float) and not math.isfinite(value):
            yield "model-index", f"a metric of {dataset.get('name')!r} is {value}. Leave out what was not measured."
    source = result.get("source")
    if source is not None and not (isinstance(source, dict) and source.get("url")):
        yield "model-index", "a result's source lacks its url."
