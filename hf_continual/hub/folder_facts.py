"""Facts of a folder: read from its files, or from a model without such files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from hf_continual.atomic_files import read_json
from hf_continual.data import handover
from hf_continual.hub.facts import (
    CONFIG,
    RESULTS,
    CardFacts,
    Evaluation,
    GaugeFacts,
    LearnedFacts,
    MergeFacts,
    MethodFacts,
    TaskFacts,
)
from hf_continual.hub.refs import ModelRef
from hf_continual.paper import Paper

ADAPTER = "adapter_config.json"


def read_facts(folder: Path) -> CardFacts:
    """Read the facts in a folder.

    Args:
        folder: A folder with ``continual_config.json``, and ``continual_results.json`` if something was measured.

    Returns:
        The facts.

    Raises:
        FileNotFoundError: If there are none.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {CONFIG}: nothing is known about how its model was made. Folders of ContinualTrainer, "
            f"train_stream and merges have one."
        )
    facts = with_learned(facts_from(read_json(file)), folder)
    results = folder / RESULTS
    return replace(facts, evaluation=evaluation_from(read_json(results))) if results.is_file() else facts


def with_learned(facts: CardFacts, folder: Path) -> CardFacts:
    """Add the state that methods left in the folder to the facts, unless it is not published.

    Args:
        facts: The facts.
        folder: The folder.

    Returns:
        The facts.

    Raises:
        HandOverError: If that state is damaged.
    """
    found = None if facts.method_state == "left out" else handover.read(folder, check_weights=False)
    kept = () if found is None else [k for k in found.methods if not k.rows]  # which are not published
    return replace(facts, learned=tuple(LearnedFacts(k.name, k.kind, k.what, k.tensors, k.bytes) for k in kept))


def has_facts(folder: Path) -> bool:
    """Whether a folder holds facts."""
    return (folder / CONFIG).is_file()


def facts_from(data: Mapping[str, Any]) -> CardFacts:
    """Facts from the data of `CardFacts.to_dict`."""
    known = {f.name for f in fields(CardFacts)}
    values: dict[str, Any] = {k: v for k, v in data.items() if k in known}
    values["base"] = _ref(data.get("base")) or ModelRef()
    values["parent"] = _ref(data.get("parent"))
    values["tasks"] = tuple(_task(t) for t in data.get("tasks", []))
    values["methods"] = tuple(
        MethodFacts(m["name"], m.get("options") or {}, _paper(m.get("paper"))) for m in data.get("methods", [])
    )
    values["tags"] = tuple(data.get("tags", ()))
    values["ended"] = tuple(data.get("ended") or ())
    values["languages"] = tuple(data.get("languages", ()))
    if merge := data.get("merge"):
        inputs = tuple(_ref(r) or ModelRef() for r in merge["inputs"])
        rest: dict[str, Any] = {**merge, "inputs": inputs, "paper": _paper(merge.get("paper"))}
        rest["notes"] = tuple(merge.get("notes") or ())
        values["merge"] = MergeFacts(**rest)
    return CardFacts(**values)


def _task(data: Mapping[str, Any]) -> TaskFacts:
    values: dict[str, Any] = dict(data)
    for key in ("started_from", "checkpoint"):
        values[key] = _ref(data.get(key))
    return TaskFacts(**values)


def _ref(data: Mapping[str, Any] | None) -> ModelRef | None:
    return None if data is None else ModelRef(**data)


def _paper(data: Mapping[str, Any] | None) -> Paper | None:
    return None if data is None else Paper(**data)


def evaluation_to(evaluation: Evaluation) -> dict[str, Any]:
    """The data of ``continual_results.json``: the matrix, and the figures computed from it."""
    width = len(evaluation.tasks)
    data: dict[str, Any] = {
        "format": 1,
        "status": "MEASURED" if evaluation.matrix else "NOT_RUN",
        "tasks": list(evaluation.tasks),
        "metric": evaluation.metric,
        "lower_is_better": evaluation.lower_is_better,
        "matrix": [[*row, *[None] * (width - len(row))] for row in evaluation.matrix],
        "base_row": None if evaluation.base_row is None else list(evaluation.base_row),
        **evaluation.figures,
        "intervals": {name: list(pair) for name, pair in evaluation.intervals.items()},
        "rows": dict(evaluation.rows),
        "not_measured": dict(evaluation.status),
        "general_abilities": [{f.name: getattr(g, f.name) for f in fields(GaugeFacts)} for g in evaluation.gauges],
    }
    if evaluation.row_names is not None:
        data["row_names"] = list(evaluation.row_names)
    if evaluation.best_plain is not None:
        data["best_plain"] = dict(evaluation.best_plain)
    return data


def evaluation_from(data: Mapping[str, Any]) -> Evaluation:
    """An evaluation from the data of `evaluation_to`; the figures are computed again."""
    base, names = data.get("base_row"), data.get("row_names")
    return Evaluation(
        tasks=tuple(data.get("tasks", ())),
        matrix=tuple(tuple(row) for row in data.get("matrix", ())),
        base_row=None if base is None else tuple(base),
        metric=data.get("metric"),
        lower_is_better=data.get("lower_is_better", False),
        rows=data.get("rows") or {},
        status=data.get("not_measured") or {},
        gauges=tuple(GaugeFacts(**g) for g in data.get("general_abilities", ())),
        intervals={name: (pair[0], pair[1]) for name, pair in (data.get("intervals") or {}).items()},
        row_names=None if names is None else tuple(names),
        best_plain=data.get("best_plain"),
    )


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / ADAPTER).is_file()


def has_chat(folder: Path) -> bool:
    """Whether the tokenizer of a folder has a chat template."""
    config = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (
        config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8")
    )
