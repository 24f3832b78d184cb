"""The order of the site's pages."""

from __future__ import annotations

from typing import Any

from hf_continual.methods.table import TABLE

# Title -> page; a page that is not here and comes from a recipe, a notebook or the guide is listed under "More".
FIRST: dict[str, Any] = {
    "Home": "index.md",
    "Quick start": "quickstart.md",
    "Which method when": "choosing.md",
    "Guide": {
        "Methods": "methods.md",
        "Starting from an adapter": "adapters.md",
        "Task sequences": "sequences.md",
        "Seeing and stopping": "watching.md",
        "Merging": "merging.md",
        "Publishing": "publishing.md",
        "Several processes": "processes.md",
        "Cost": "cost.md",
        "What is tested where": "tested.md",
        "Questions": "faq.md",
        "Adding to it": "extending.md",
    },
}
LAST = {"Papers": "papers.md", "Command line": "commands.md", "Reference": "reference.md"}
ABOUT = {"Changelog": "changelog.md", "Citation": "citation.md"}


def navigation(sources: dict[str, str]) -> list[Any]:
    """The tree of pages for mkdocs.

    Args:
        sources: Pages that are written from one file, page -> file.

    Returns:
        mkdocs' `nav`.
    """
    named = set(pages_of([FIRST, LAST, ABOUT]))
    recipes = [page for page in sources if page.startswith("recipes/")]
    notebooks = [page for page in sources if page.startswith("notebooks/")]
    more = [page for page in sources if "/" not in page and page not in named]
    missing = [page for page in named - set(sources) if page not in (*LAST.values(), *ABOUT.values())]
    if missing:
        raise ValueError(f"navigation.py lists {', '.join(sorted(missing))}, which recipes/guide does not hold.")
    tree: list[Any] = [
        {title: entry if isinstance(entry, str) else [{t: p} for t, p in entry.items()]}
        for title, entry in FIRST.items()
    ]
    tree.append({"Methods": [{name: f"methods/{name}.md"} for name in TABLE]})
    tree.append({"Recipes": recipes})
    tree.append({"Notebooks": notebooks})
    tree += [{title: page} for title, page in LAST.items()]
    tree.append({"About": [*more, *({title: page} for title, page in ABOUT.items())]})
    return tree


def pages_of(entries: Any) -> list[str]:
    """All pages of a tree."""
    if isinstance(entries, str):
        return [entries]
    below = entries.values() if isinstance(entries, dict) else entries
    return [page for entry in below for page in pages_of(entry)]
