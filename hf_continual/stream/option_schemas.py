"""JSON schemas of options: the hyper-parameters of a class or the parameters of a function, from their annotations.

An editor completes what the code says: names, types, defaults and the sentence of the docstring. A type that has no form in
JSON, such as a `datasets.Dataset`, is left out of a union, and alone allows anything.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import MISSING, fields, is_dataclass
from types import SimpleNamespace
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError, PydanticUserError

from hf_continual.option_names import documented
from hf_continual.plain import is_plain

Schema = dict[str, Any]
# YAML 1.1, in which plans are written, takes 2e-4 for text; methods and training arguments read it as a number.
NUMERIC = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
OWN = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
OWN_NAME: Schema = {"type": "string", "pattern": OWN, "description": "Your own, as package.module:name."}
DEFS = "#/$defs/"


def ref(name: str) -> Schema:
    """A reference to a definition of the schema."""
    return {"$ref": f"{DEFS}{name}"}


def of_type(hint: Any, definitions: MutableMapping[str, Schema], as_text: bool = False) -> Schema:
    """The schema of an annotation.

    Args:
        hint: The annotation.
        definitions: Gets what the schema refers to, such as an enumeration.
        as_text: Whether a number may be written as text.

    Returns:
        The schema; empty if nothing is known about the type.
    """
    try:
        config = ConfigDict(arbitrary_types_allowed=True)
        # Pydantic refuses a configuration for types that have their own.
        own = is_dataclass(hint) or hasattr(hint, "model_fields") or typing.is_typeddict(hint)
        made = TypeAdapter(hint, config=None if own else config).json_schema(ref_template=f"{DEFS}{{model}}")
    except (PydanticInvalidForJsonSchema, PydanticSchemaGenerationError, PydanticUserError, TypeError, NameError):
        return {}
    definitions.update({name: tidied(schema) for name, schema in made.pop("$defs", {}).items()})
    return tidied(made, as_text)


def tidied(schema: Any, as_text: bool = False) -> Any:
    """A schema of pydantic without titles; with `as_text` a number may be written as text."""
    if isinstance(schema, list):
        return [tidied(part, as_text) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {
        key: {name: tidied(part, as_text) for name, part in value.items()}
        if key == "properties"
        else tidied(value, as_text)
        for key, value in schema.items()
        if key != "title" or not isinstance(value, str)
    }
    if as_text and found.get("type") == "number":
        found |= {"type": ["number", "string"], "pattern": NUMERIC}
    return found


def options_schema(
    owner: Any,
    definitions: MutableMapping[str, Schema],
    names: Iterable[str] | None = None,
    also: Mapping[str, Schema] | None = None,
    required: bool = True,
    as_text: bool = False,
) -> Schema:
    """The schema of a mapping of options.

    Args:
        owner: A dataclass, or a function.
        definitions: Gets what the schema refers to.
        names: The options; by default all.
        also: Further forms of single options, by name.
        required: Whether an option without a default must be given.
        as_text: Whether a number may be written as text.

    Returns:
        An object without other keys.
    """
    defaults, hints, said = _defaults(owner), hints_of(owner), documented(owner)
    if is_dataclass(owner):
        said = {f.name: " ".join(str(f.metadata["help"]).split()) for f in fields(owner) if "help" in f.metadata} | said
    properties = {}
    for name in defaults if names is None else names:
        schema = of_type(hints.get(name, Any), definitions, as_text)
        if also and name in also and schema:
            schema = _either(schema, also[name])
        if name in said:
            schema["description"] = said[name]
        if defaults.get(name, MISSING) is not MISSING and is_plain(defaults[name]):
            schema["default"] = defaults[name]
        properties[name] = schema
    found: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    needed = [name for name in properties if defaults.get(name) is MISSING]
    return {**found, "required": needed} if needed and required else found


def _either(schema: Schema, other: Schema) -> Schema:
    return {"anyOf": [*schema.get("anyOf", [schema]), other]}


def first_sentence(described: Any) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join(inspect.cleandoc(described.__doc__ or "").partition("\n\n")[0].split()).replace("`", "")


def _defaults(owner: Any) -> dict[str, Any]:
    """Name of each option -> its default, MISSING if it must be given, None where a default is made for each."""
    if is_dataclass(owner):
        made = {f.name: f.default for f in fields(owner) if f.init}
        return made | {f.name: None for f in fields(owner) if f.init and f.default_factory is not MISSING}
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    taken = inspect.signature(owner).parameters.values()
    return {p.name: MISSING if p.default is p.empty else p.default for p in taken if p.kind not in kinds}


def hints_of(owner: type | Callable[..., Any]) -> dict[str, Any]:
    """Annotations by name, without those whose names exist for type checkers only."""
    try:
        return typing.get_type_hints(owner)
    except NameError:
        found: dict[str, Any] = {}
        names = getattr(owner, "__globals__", None) or vars(sys.modules[owner.__module__])
        for name, hint in owner.__annotations__.items():
            with contextlib.suppress(NameError):
                found |= typing.get_type_hints(SimpleNamespace(__annotations__={name: hint}), names)
        return found
