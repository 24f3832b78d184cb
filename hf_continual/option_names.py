"""The names of a dataclass's fields, read from its source.

Importing SFTConfig or a method imports torch, which takes seconds. A misspelled option should be reported before that.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

SFT_CONFIG = "trl.trainer.sft_config:SFTConfig"
LORA_CONFIG = "peft.tuners.lora.config:LoraConfig"
# Adapters that a plan may add, by PEFT's name of the kind.
PEFT_CONFIGS = {"LORA": LORA_CONFIG, "PROMPT_TUNING": "peft.tuners.prompt_tuning.config:PromptTuningConfig"}


@functools.cache
def option_names(target: str) -> dict[str, bool]:
    """List the arguments that a dataclass takes.

    Args:
        target: The class as ``"package.module:Class"``.

    Returns:
        Name of each field -> whether it must be given, in the order of the class; empty if the module is not installed.
    """
    module, _, name = target.partition(":")
    try:
        return dict(_fields(module, name))
    except (OSError, SyntaxError, LookupError):
        return _imported(module, name)


def _imported(module: str, name: str) -> dict[str, bool]:
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return {}
    return {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(found) if f.init}


def _fields(module: str, name: str) -> Iterator[tuple[str, bool]]:
    """The fields of a class and of its bases, the bases' first; follows `from ... import` to the class's definition."""
    tree, imports = _read(module)
    body = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
    if body is None:
        source, original = imports[name]
        yield from _fields(source, original)
        return
    for base in body.bases:
        if isinstance(base, ast.Name) and (base.id in imports or _defines(tree, base.id)):
            source, original = imports.get(base.id, (module, base.id))
            # Bases from elsewhere, such as transformers' PushToHubMixin, add methods and no fields.
            if source.split(".")[0] == module.split(".")[0] or original.endswith(("Config", "Arguments")):
                yield from _fields(source, original)
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            annotation = ast.unparse(node.annotation)
            options = {k.arg: k.value for k in node.value.keywords} if isinstance(node.value, ast.Call) else {}
            made_inside = isinstance(options.get("init"), ast.Constant) and not options["init"].value  # pyrefly: ignore
            if not annotation.startswith("ClassVar") and not made_inside:
                is_field = isinstance(node.value, ast.Call) and ast.unparse(node.value.func).endswith("field")
                defaults = {"default", "default_factory"} & set(options)
                yield node.target.id, node.value is None or (is_field and not defaults)


def _defines(tree: ast.Module, name: str) -> bool:
    return any(isinstance(n, ast.ClassDef) and n.name == name for n in tree.body)


@functools.cache
def _read(module: str) -> tuple[ast.Module, dict[str, tuple[str, str]]]:
    """A module's syntax, and the source of each name it imports."""
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)  # of a top-level package: imports nothing
    if spec is None or spec.origin is None:
        raise FileNotFoundError(module)
    path = Path(spec.origin).parent.joinpath(*rest)
    is_package = path.is_dir()
    tree = ast.parse((path / "__init__.py" if is_package else path.with_suffix(".py")).read_text(encoding="utf-8"))
    imports: dict[str, tuple[str, str]] = {}
    here = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            imports |= {alias.asname or alias.name: (source, alias.name) for alias in node.names}
    return tree, imports


def documented(described: Any) -> dict[str, str]:
    """The description of each argument in the docstring of a function, or in those of a class and its bases.

    Args:
        described: A function, or a class whose fields are under ``Args:``.

    Returns:
        Name -> one line, without marks of code.
    """
    found: dict[str, str] = {}
    for owner in reversed(described.__mro__) if isinstance(described, type) else [described]:
        _, _, listed = inspect.cleandoc(owner.__doc__ or "").partition("\nArgs:\n")
        listed = re.split(r"\n(?=\S)", listed)[0]
        for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", listed, re.MULTILINE):
            found[name] = " ".join(text.split()).replace("`", "")
    return found
