"""The JSON schema of plans: for completion and checks in an editor, and for programs that write plans.

It is made from what reads a plan: the fields of `hf_continual.stream.plan`, the tables of methods, merges, scorers and benchmarks,
and the options of each, from its code. So a new method is in it without a change here. It knows the short forms too: a model as
text, methods by name, ``merge: linear``. What only a run can know (whether a file exists, which tasks a sweep's order names, numbers
out of a method's range) is left to ``hf-continual run --dry-run``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hf_continual.data.benchmarks import BENCHMARKS
from hf_continual.data.biography import biography_rows
from hf_continual.evaluation.table import SCORERS
from hf_continual.merging.engine.options import OutputOptions
from hf_continual.merging.methods.table import MERGES, merge_class
from hf_continual.methods.table import TABLE, method_class
from hf_continual.named import imported
from hf_continual.option_names import PEFT_CONFIGS, SFT_CONFIG, documented, option_names
from hf_continual.stream import plan as plans
from hf_continual.stream.check_plan import OURS, PLANS_OWN
from hf_continual.stream.option_schemas import (
    OWN_NAME,
    Schema,
    first_sentence,
    hints_of,
    of_type,
    options_schema,
    ref,
    tidied,
)
from hf_continual.stream.past_rows import EARLIER, KEPT
from hf_continual.trainer.config import ContinualConfig

DRAFT = "http://json-schema.org/draft-07/schema#"  # the draft that editors for YAML know best
_NULL: Schema = {"type": "null"}
_COUNT: Schema = {"type": ["integer", "null"], "minimum": 1}
# Fields that are written in more ways than their type says: field -> the definition with all of them.
_FIELDS = {
    "model": "Model",
    "methods": "Methods",
    "sft": "Sft",
    "peft": "Peft",
    "train": "Rows",
    "test": "Rows",
    "rows": "Rows",
    "metric": "Metric",
}


def plan_schema() -> Schema:
    """Make the schema of a plan's file.

    Returns:
        Draft 7, as plain data. Methods, merges and scorers are imported, which takes seconds.
    """
    made = plans.Plan.model_json_schema()
    definitions: dict[str, Schema] = {name: tidied(part) for name, part in made.pop("$defs").items()}
    root = tidied(made)
    for name, part in [("Plan", root), *definitions.items()]:
        if isinstance(model := getattr(plans, name, None), type) and "properties" in part:
            _document(part, model)
            _widen(name, part)
    made_here: dict[str, Schema] = {}
    _add_methods(made_here)
    _add_merges(definitions, made_here)
    _add_metrics(made_here)
    _add_tasks(definitions["TaskPlan"], made_here)
    made_here["Model"] = {
        "anyOf": [{"type": "string", "description": "Folder or Hub id."}, ref("ModelPlan")],
        "description": first_sentence(plans.ModelPlan),
    }
    made_here["Sft"] = _sft(made_here)
    made_here["Peft"] = _peft(made_here)
    either = {"anyOf": [ref("Task"), {"type": "array", "items": ref("Task"), "minItems": 1}]}
    root["properties"]["tasks"] = {**either, "description": root["properties"]["tasks"].get("description", "")}
    return {"$schema": DRAFT, "title": "Plan of hf_continual", **root, "$defs": {**made_here, **definitions}}


def _document(part: Schema, model: type) -> None:
    """Put the sentences of a docstring where an editor shows them."""
    part["description"] = first_sentence(model)
    for name, text in documented(model).items():
        if name in part["properties"]:
            part["properties"][name]["description"] = text


def _widen(name: str, part: Schema) -> None:
    """Name the definition of a field that is written in several ways."""
    for field, schema in part["properties"].items():
        if field == "methods" and name == "SweepPlan":
            arms = {"type": "object", "additionalProperties": ref("Methods")}
            new: Schema = {"anyOf": [arms, _NULL]}
        elif field in _FIELDS:
            wanted = ref(_FIELDS[field])
            nullable = "default" in schema and schema["default"] is None and field not in ("methods", "peft")
            new = {"anyOf": [wanted, _NULL]} if nullable else {"allOf": [wanted]}  # draft 7 reads nothing next to $ref
        else:
            continue
        part["properties"][field] = {**new, **{k: schema[k] for k in ("description", "default") if k in schema}}


def _add_methods(found: dict[str, Schema]) -> None:
    """Definitions of each method's hyper-parameters, of an entry, and of a description of methods."""
    named: dict[str, Schema] = {}
    bare: list[str] = []
    for name in TABLE:
        cls = method_class(name)
        options = options_schema(cls, found, also=dict.fromkeys(cls.row_sources(), ref("PastRows")), as_text=True)
        found[f"method-{name}"] = {**options, "description": first_sentence(cls)}
        needed = "required" in options
        named[name] = ref(f"method-{name}") if needed else {"anyOf": [ref(f"method-{name}"), _NULL]}
        bare += [] if needed else [name]
    number = {EARLIER: _COUNT, KEPT: _COUNT}
    shared: Schema = {"of": {"type": ["array", "null"], "items": {"type": "string"}}, "seed": {"type": "integer"}}
    found["PastRows"] = {
        "description": "Rows of earlier tasks: at most this many of each, of the tasks that are listed.",
        "anyOf": [
            {"type": "object", "properties": {word: count, **shared}, "required": [word], "additionalProperties": False}
            for word, count in number.items()
        ],
    }
    entry: Schema = {
        "anyOf": [
            {"type": "string", "enum": bare},
            OWN_NAME,
            {
                "type": "object",
                "properties": named,
                "patternProperties": {OWN_NAME["pattern"]: {"type": ["object", "null"]}},
                "additionalProperties": False,
            },
        ]
    }
    found["MethodEntry"] = entry
    found["Methods"] = {"anyOf": [ref("MethodEntry"), {"type": "array", "items": ref("MethodEntry")}, _NULL]}


def _add_merges(definitions: dict[str, Schema], found: dict[str, Schema]) -> None:
    """The merges by name, and for each its options; a plan gives base and calibration itself, so none is required."""
    said = documented(OutputOptions)
    shared = {
        name: {**of_type(hint, found), "description": said[name]} for name, hint in hints_of(OutputOptions).items()
    }
    merge = definitions["MergePlan"]
    merge["allOf"] = []
    for name in MERGES:
        cls = merge_class(name)
        options = options_schema(cls, found, required=False)
        options["properties"] |= {key: schema for key, schema in shared.items() if key not in options["properties"]}
        found[f"merge-{name}"] = {**options, "description": first_sentence(cls)}
        spelled = sorted({name, name.replace("_", "-")})
        asked = {"properties": {"function": {"enum": spelled}}, "required": ["function"]}
        merge["allOf"].append({"if": asked, "then": {"properties": {"options": ref(f"merge-{name}")}}})
    every = sorted({spelling for name in MERGES for spelling in (name, name.replace("_", "-"))})
    names: Schema = {"anyOf": [{"type": "string", "enum": every}, OWN_NAME]}
    merge["properties"]["function"] |= names
    between = definitions["Between"]["properties"]
    between["merge"] = {"anyOf": [*names["anyOf"], ref("MergePlan")]}


def _add_metrics(found: dict[str, Schema]) -> None:
    named: dict[str, Schema] = {}
    for name, target in SCORERS.items():
        scorer = imported(target)
        names = list(option_names_of(scorer))
        options = options_schema(scorer, found, names)
        found[f"metric-{name}"] = {**options, "description": first_sentence(scorer)}
        named[name] = {"anyOf": [ref(f"metric-{name}"), _NULL]}
    one: Schema = {"type": "object", "properties": named, "minProperties": 1, "maxProperties": 1}
    one |= {"patternProperties": {OWN_NAME["pattern"]: {"type": ["object", "null"]}}, "additionalProperties": False}
    found["Metric"] = {"anyOf": [{"type": "string", "enum": list(SCORERS)}, OWN_NAME, one]}


def option_names_of(scorer: Any) -> Iterable[str]:
    """The options of a scorer: its parameters after model, tokenizer and rows."""
    return list(options_schema(scorer, {}, required=False)["properties"])[3:]


def _add_tasks(task: Schema, found: dict[str, Schema]) -> None:
    """An entry of `tasks`: a task, or a benchmark, whose keys of a task apply to all of its tasks."""
    entries = []
    for name, function in BENCHMARKS.items():
        own = options_schema(function, found)
        properties = {"benchmark": {"const": name}, **own["properties"], **task["properties"]}
        found[f"benchmark-{name}"] = {
            "type": "object",
            "description": first_sentence(function),
            "properties": properties,
            "required": ["benchmark", *own.get("required", ())],
            "additionalProperties": False,
        }
        entries.append(ref(f"benchmark-{name}"))
    chosen = {"type": "object", "properties": {"biography": options_schema(biography_rows, found)}}
    found["Rows"] = {
        "anyOf": [
            {"type": "string", "description": "A file, a saved folder, or a Hub id."},
            {**chosen, "required": ["biography"], "additionalProperties": False},
            {"type": "array", "items": {"type": "object"}, "minItems": 1},
        ]
    }
    # A branch for each kind would make every message one about `anyOf`.
    branch: Schema = ref("TaskPlan")
    for entry, name in zip(entries, BENCHMARKS, strict=True):
        asked = {"properties": {"benchmark": {"const": name}}, "required": ["benchmark"]}
        branch = {"if": asked, "then": entry, "else": branch}
    found["Task"] = {"type": "object", **({"allOf": [branch]} if "$ref" in branch else branch)}


def _sft(found: dict[str, Schema]) -> Schema:
    names = [*option_names(SFT_CONFIG), *OURS]
    return options_schema(ContinualConfig, found, [name for name in names if name not in PLANS_OWN], as_text=True)


def _peft(found: dict[str, Schema]) -> Schema:
    """The options of the adapter that `peft_type` names; of a LoRA without it."""
    branch: Schema = ref("peft-LORA")
    for kind, target in PEFT_CONFIGS.items():
        options = options_schema(imported(target), found, option_names(target), required=False)
        options["properties"]["peft_type"] = {"enum": list(PEFT_CONFIGS)}
        found[f"peft-{kind}"] = options
        if kind != "LORA":
            asked = {"properties": {"peft_type": {"const": kind}}, "required": ["peft_type"]}
            branch = {"if": asked, "then": ref(f"peft-{kind}"), "else": branch}
    return {"if": _NULL, "else": {"type": "object", **branch}}
