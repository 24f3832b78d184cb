"""The index of papers: each with its method, the snippet of its setting, what differs from its code, and the numbers."""

from __future__ import annotations

from typing import Any

from site_map import ROOT
from tables import section

from hf_continual.merging.methods.table import MERGES, merge_class
from hf_continual.methods.table import TABLE, method_class
from hf_continual.paper import Paper


def paper_index() -> str:
    """The page, with links as from recipes/guide."""
    papers = [(name, method_class(name)) for name in TABLE]
    parts = [
        "# Papers",
        "",
        "Every paper whose method is here, newest first: how to run its setting, what differs from the authors' code, and our number next to theirs "
        "where there is one. Merge rules are at the end. To cite: [citation](citation.md).",
        "",
        "| paper | year | method |",
        "|---|---|---|",
    ]
    found = sorted(((cls.paper, name, cls) for name, cls in papers if cls.paper), key=lambda p: -p[0].year)
    parts += [f"| [{p.title}](#{name}) | {p.year} | [`{name}`](../{name}) |" for p, name, _ in found]
    for paper, name, cls in found:
        parts += ["", *entry(paper, name, cls.__name__)]
    parts += ["", "## Merge rules", "", *merges()]
    return "\n".join(parts) + "\n"


def entry(paper: Paper, name: str, title: str) -> list[str]:
    """One method's paper."""
    text = (ROOT / "recipes" / name / "README.md").read_text(encoding="utf-8")
    said = section(text, "Paper and code") or ""
    return [
        f"## {title} {{ #{name} }}",
        "",
        f"{cited(paper)}. Method: [`{name}`](../{name}).",
        "",
        "```",
        *commands(name),
        "```",
        "",
        said,
    ]


def commands(name: str) -> list[str]:
    """The command that trains with each recipe of a method, on the sample rows."""
    files = sorted((ROOT / "recipes" / name).glob("*.yaml"))
    lora = "--peft '{r: 8, target_modules: all-linear}'"
    return [
        f"hf-continual train --config recipes/{name}/{file.name} --model MODEL --train ROWS.jsonl {lora if needs_lora(name, file.stem) else ''}".rstrip()
        for file in files
    ]


def needs_lora(name: str, stem: str) -> bool:
    """Whether a recipe's file is for an adapter that `peft_config` gives."""
    return stem in ("lora", "qlora") or name == "o_lora"


def cited(paper: Paper) -> str:
    """A paper as text with a link."""
    title = f"[{paper.title}]({paper.url})" if paper.url else paper.title
    venue = paper.venue or "arXiv"
    return f"{paper.authors}, *{title}*, {venue}" + ("" if str(paper.year) in venue else f", {paper.year}")


def merges() -> list[str]:
    """A table of the merge rules and their papers."""
    lines = ["| merge | paper |", "|---|---|"]
    for name in MERGES:
        paper: Any = getattr(merge_class(name), "paper", None)
        lines.append(f"| `{name}` | {cited(paper) if paper else ''} |")
    return [*lines, "", "Measured with each other: [recipes/recall](../recall)."]


def citation() -> str:
    """The page of citations: the library, and BibTeX of every paper."""
    records = {method_class(name).paper for name in TABLE} | {
        getattr(merge_class(name), "paper", None) for name in MERGES
    }
    papers = sorted((p for p in records if p), key=lambda p: (p.authors, p.year))
    blocks = "\n\n".join(f"```bibtex\n{paper.bibtex}\n```" for paper in papers)
    return (
        "# Citation\n\nCite the papers of the methods that you use; each method knows its own.\n\n"
        "```python\nfrom hf_continual import RecAdam\n\nprint(RecAdam.paper.bibtex)\n```\n\n"
        f"The library is licensed under Apache-2.0.\n\n## Papers\n\n{blocks}\n"
    )
