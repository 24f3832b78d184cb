"""The snippets of the pages: found, told apart, and checked without running them."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
INDENTED = re.compile(r"(?:^|\n\n)((?: {4}(?:cd|hf-continual|python|make|accelerate) .*\n)+)")
# Lines of a block of commands that are not a command of this project.
OTHER = re.compile(
    r"cd \S+$|#SBATCH |[A-Z]+=|export |(?:git|uv pip|uv venv|pip|hf|srun|sbatch|axolotl|llamafactory-cli|docker) "
)

OWN = "mine"  # what the pages call the reader's own module inside the package


class Snippet(NamedTuple):
    """A block of a page."""

    page: str
    language: str
    text: str

    @property
    def name(self) -> str:
        """What tests call it."""
        return f"{self.page.removeprefix('recipes/').removesuffix('.md')}-{self.text.strip().splitlines()[0][:40]}"


def pages() -> list[str]:
    """Files of the repository that are pages of the site, in order."""
    found = [ROOT / "README.md", *(ROOT / "recipes").glob("*.md"), *(ROOT / "recipes").glob("*/*.md")]
    return sorted(file.relative_to(ROOT).as_posix() for file in found)


def snippets(page: str) -> list[Snippet]:
    """The blocks of a page; blocks without a language are commands, or the picture of a folder."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [Snippet(page, language or "commands", body) for language, body in FENCED.findall(text)]
    indented = INDENTED.findall(FENCED.sub("", text) + "\n")
    found += [Snippet(page, "commands", re.sub("^ {4}", "", body, flags=re.M)) for body in indented]
    return [s._replace(language="commands") if s.language == "bash" else s for s in found if not is_tree(s)]


def is_tree(snippet: Snippet) -> bool:
    """Whether a block shows files: its first line is a folder, and the next ones are indented."""
    lines = snippet.text.splitlines()
    return snippet.language == "commands" and lines[0].endswith("/") and lines[1].startswith("  ")


def commands(snippet: Snippet) -> Iterator[str]:
    """The commands of a block, one per line, without comments and what a shell does after them."""
    joined = re.sub(r"\\\n\s*", "", snippet.text)
    for line in joined.splitlines():
        plain = re.sub(r"\s+#\s.*$", "", line).strip()
        for one in re.split(r";\s|\s&&\s|\s>\s", plain)[:1]:
            if one and not OTHER.match(one):
                yield one


def check_command(line: str) -> None:
    """Whether a command exists with these options, without running it.

    Raises:
        ValueError: If it does not.
    """
    words = shlex.split(line.replace(" ... ", " "))
    if "hf_continual" in words and words[0] in ("python", "accelerate"):
        words = ["hf-continual", *words[words.index("hf_continual") + 1 :]]
    if words[0] == "hf-continual":
        _check_verb(words[1:])
    elif words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        if words[1] not in targets:
            raise ValueError(f"the Makefile has no target {words[1]}")
    elif words[0] in ("python", "accelerate") or words[:2] == ["uv", "run"]:
        _check_script(words)
    elif words[0] == "pytest":
        for word in words[1:]:
            if word.startswith("tests/") and OWN not in word and not (ROOT / word).exists():
                raise ValueError(f"there is no {word}")
    else:
        raise ValueError(f"{line!r} is not a command of this project")


def _check_verb(words: list[str]) -> None:
    import click
    from typer.main import get_command

    from hf_continual.cli import app

    command: Any = get_command(app)
    if words[0].startswith("-"):
        return
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    if command.name == "merge":  # it parses its own arguments; what it prints as help is what it takes
        return _check_merge(words)
    try:
        command.make_context(command.name, words, resilient_parsing="--help" in words).close()
    except click.exceptions.Exit:
        pass


def _check_merge(words: list[str]) -> None:
    from hf_continual.merging.engine.options import Output
    from hf_continual.merging.method_options import options_of
    from hf_continual.merging.methods.table import MERGES

    known = {"--base", "--out", "--dry-run", "--config", "--help", "--set", "--json", "--quiet", "--old"}
    known |= {f"--{name.replace('_', '-')}" for name in Output.__dataclass_fields__}
    method = next(iter(words), "")
    if not method.startswith("-") and ":" not in method:
        if method.replace("-", "_") not in MERGES:
            raise ValueError(f"there is no merge {method}")
        for option in options_of(method).values():
            known |= {*option.spellings, *option.flags}
    flags = [w.partition("=")[0] for w in words if w.startswith("--")]
    if ":" not in method and (unknown := set(flags) - known):
        raise ValueError(f"merge {method} has no {', '.join(sorted(unknown))}")


def _check_script(words: list[str]) -> None:
    script = next(word for word in words[1:] if word.endswith(".py"))
    if script == "train.py":  # the reader's own
        return
    source = (ROOT / script).read_text(encoding="utf-8")
    for flag in (word for word in words if word.startswith("--") and words.index(word) > words.index(script)):
        if f'"{flag}"' not in source:
            raise ValueError(f"{script} has no {flag}")


def check_yaml(text: str, folder: Path) -> str:
    """Check a block of YAML by what it is.

    Returns:
        What it is: configuration, plan, gate, merge, keys of a plan, or another trainer's.
    """
    from jsonschema import Draft202012Validator

    from hf_continual.stream.plan_schema import plan_schema

    data = yaml.safe_load(text)
    (folder / "snippet.yaml").write_text(text, encoding="utf-8")
    if "continual" in data:  # another trainer's file
        from hf_continual.methods.table import check_description

        check_description(data["continual"]["methods"])
        return "another trainer's"
    if {"baseline", "alpha"} & set(data):
        from hf_continual.stream.gate_limits import read_limits

        read_limits(folder / "snippet.yaml")
        return "gate"
    if {"models", "merge_method"} & set(data):
        from hf_continual.merging.config_file import read_merge_file

        read_merge_file(folder / "snippet.yaml")
        return "merge"
    if "output_dir" in data and "tasks" not in data:
        return _check_configuration(data)
    schema = plan_schema()
    whole = {"model", "tasks"} <= set(data)
    if not whole:
        schema = {**schema, "required": []}
    errors = [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(data)]
    if errors:
        raise ValueError("; ".join(errors))
    if "methods" in data:
        from hf_continual.methods.table import check_description

        check_description(data["methods"])
    return "plan" if whole else "keys"


def _check_configuration(data: dict[str, Any]) -> str:
    import dataclasses

    from hf_continual import ContinualConfig
    from hf_continual.methods.table import check_description

    if unknown := set(data) - {field.name for field in dataclasses.fields(ContinualConfig)}:
        raise ValueError(f"ContinualConfig has no {', '.join(unknown)}")
    check_description(data.get("methods"))
    return "configuration"


def check_calls(code: str) -> list[str]:
    """Check that a block's calls of public names take the arguments that it gives them.

    Returns:
        The names that it calls.

    Raises:
        TypeError: If a call does not fit.
    """
    import hf_continual

    tree, called = ast.parse(code), []
    known = {name: getattr(hf_continual, name) for name in hf_continual.__all__}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").startswith("hf_continual")
            and OWN not in str(node.module)
        ):
            module = importlib.import_module(node.module)
            known |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
            keywords = {k.arg: None for k in node.keywords if k.arg}
            if not any(isinstance(a, ast.Starred) for a in node.args):
                inspect.signature(known[node.func.id]).bind_partial(*node.args, **keywords)
            called.append(node.func.id)
    return called
