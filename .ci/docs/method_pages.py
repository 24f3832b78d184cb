"""The page of each method: its recipe's README, where it acts, its options, its cost, and what was measured with all the others."""

from __future__ import annotations

import inspect
import re

import frontier_picture
from hook_picture import picture
from site_map import ROOT
from tables import as_markdown, first_cell, section, tables

from hf_continual.methods.base import Method
from hf_continual.methods.compose import hooks
from hf_continual.methods.table import TABLE, method_class
from hf_continual.stream.recommend import rules
from hf_continual.trainer.parallelism import MODES, refused

# What a recipe's README must say of its method, in sections of its own.
SECTIONS = ("When not to use it", "Paper and code")
COMPARED = {
    "recipes/frontier/README.md": "Learning against retention",
    "recipes/baselines/README.md": "The systems of the papers",
}


def method_page(name: str) -> str:
    """A method's page.

    Args:
        name: Its name in the table of methods.

    Returns:
        Markdown with the links of the recipe's README.

    Raises:
        ValueError: If the README lacks a section.
    """
    cls = method_class(name)
    text = (ROOT / "recipes" / name / "README.md").read_text(encoding="utf-8")
    if missing := [title for title in SECTIONS if section(text, title) is None]:
        raise ValueError(f"recipes/{name}/README.md has no section {' and no section '.join(missing)}. Write it.")
    head, _, rest = text.partition("\n| file |")
    parts = [
        head.strip(),
        f'<figure markdown="0">{picture(name, hooks(cls))}</figure>',
        f"{idea(cls)}",
        f"| file |{rest}".strip(),
        f"## The recipes\n\n{recipes(name)}",
        f"## Options\n\n`methods: [{{{name}: {{...}}}}]`, or the class:\n\n::: {cls.__module__}.{cls.__qualname__}\n"
        "    options:\n      members: false\n      show_root_heading: true\n      heading_level: 3\n      show_docstring_description: true",
        f"## Cost and processes\n\n{cost(name, cls)}",
        f"## Measured with the others\n\n{compared(name)}",
        f"## Cite\n\n```bibtex\n{cls.paper.bibtex}\n```" if cls.paper else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def idea(cls: type[Method]) -> str:
    """What the class says of the idea, and of its relations to others."""
    said = inspect.cleandoc(cls.__doc__ or "")
    found = re.search(r"^Idea: (.*?)(?=^\w+: |^\s*$)", said, re.S | re.M)
    if found is None:
        return ""
    text = found.group(1).strip().replace("``", "`")
    return f"**Idea.** {text[0].upper()}{text[1:]}"


def recipes(name: str) -> str:
    """The files of a recipe, each in a tab."""
    files = sorted((ROOT / "recipes" / name).glob("*.yaml"))
    tabs = []
    for file in files:
        inside = "\n".join(f"    {line}".rstrip() for line in file.read_text(encoding="utf-8").rstrip().splitlines())
        tabs.append(f'=== "{file.name}"\n\n    ```yaml\n{inside}\n    ```')
    return "\n\n".join(tabs)


def cost(name: str, cls: type[Method]) -> str:
    """The rows of the table of costs that name a method, and where it runs."""
    rows = cost_rows(name, cls)
    (ratios,) = [table for table in tables("recipes/guide/cost.md") if table.head.startswith("| ratio |")]
    allowed = [f"{mode}: {'no' if mode in refused(name) else 'yes'}" for mode in MODES]
    measured = as_markdown(ratios.head, rows) if rows else "Its cost was not measured."
    return f"{measured}\n\n{'; '.join(allowed)} ([several processes](../guide/processes.md))."


def cost_rows(name: str, cls: type[Method]) -> list[str]:
    """The rows of the table of costs that name a method."""
    (ratios,) = [table for table in tables("recipes/guide/cost.md") if table.head.startswith("| ratio |")]
    plain = re.compile(rf"(?<![A-Za-z]){re.escape(cls.__name__)}(?![A-Za-z])")
    return [row for row in ratios.rows if plain.search(first_cell(row).replace("-", ""))]


def compared(name: str) -> str:
    """The rows of the tables that compare many methods, and of the table of recommendations, that rest on this one."""
    parts = []
    for file, title in COMPARED.items():
        for table in tables(file):
            rows = [row for row in table.rows if first_cell(row) == f"`{name}`"]
            if rows and table.heading == "Measured":
                plain = [row for row in table.rows if re.match(r"\| (plain|`sequential`)", row)]
                home = file.removeprefix("recipes/").removesuffix("/README.md")
                parts.append(
                    f"[{title}](../{home}), with plain fine-tuning:\n\n{as_markdown(table.head, [*rows, *plain])}"
                )
    if drawn := frontier_picture.picture(name):
        parts.insert(1, f'<figure markdown="0">{drawn}</figure>')
    for rule in rules():
        if any(name in entry for entry in rule.changes.get("methods", []) if isinstance(entry, dict)):
            parts.append(f"Recommended as [{rule.name}](../choosing.md#{rule.name}): {rule.title}. {rule.why}")
    return (
        "\n\n".join(parts) or "Not in a table with other methods yet; see the section before for what the recipe says."
    )


def methods() -> list[str]:
    """Names of all methods, in the order of the table."""
    return list(TABLE)
