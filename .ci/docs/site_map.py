"""Which file of the repository is which page of the site, and where a link between files leads on the site."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from hf_continual.methods.table import TABLE

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "recipes" / "guide"
PICTURES = (".png", ".svg", ".jpg")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".sh": "bash", ".toml": "toml"}
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
FENCE = re.compile(r"^(```.*?^```\s*?$)", re.S | re.M)


def page_of(file: str) -> str | None:
    """The page that a file of the repository, or a folder with a README, has on the site.

    Args:
        file: Path from the root of the repository, with slashes.

    Returns:
        Path of the page's source in the site, or None if the file is not a page.
    """
    if (ROOT / file).is_dir():
        file = posixpath.join(file, "README.md").removeprefix("./")
    if file == "README.md":
        return "index.md"
    parts = file.split("/")
    if parts[0] == "recipes" and file.endswith(".md") and (ROOT / file).is_file():
        if len(parts) == 2:
            return parts[1]
        if parts[1] == "guide":
            return "/".join(parts[2:])
        if parts[2:] == ["README.md"]:
            return f"methods/{parts[1]}.md" if parts[1] in TABLE else f"recipes/{parts[1]}.md"
    if parts[0] == "notebooks" and file.endswith(".ipynb"):
        return f"notebooks/{Path(file).stem}.md"
    return None


def sources() -> dict[str, str]:
    """Pages that are written from one file of the repository: page -> file."""
    files = [ROOT / "README.md", *(ROOT / "recipes").glob("*.md"), *(ROOT / "recipes").glob("*/README.md")]
    files += [*GUIDE.glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    named = [file.relative_to(ROOT).as_posix() for file in sorted(files)]
    return {page: file for file in named if (page := page_of(file)) is not None}


def text_of(file: str) -> str:
    """A page's Markdown, before its links are those of the site."""
    if file.endswith(".ipynb"):
        from notebook_page import as_markdown

        return as_markdown(file)
    return (ROOT / file).read_text(encoding="utf-8")


def outside_fences(text: str, change: Callable[[str], str]) -> str:
    """Change a page's text, but not its blocks of code."""
    return "".join(part if part.startswith("```") else change(part) for part in FENCE.split(text))


def links(text: str, file: str) -> Iterator[str]:
    """Files and folders of the repository that a page links, as paths from the root."""
    found: list[str] = []

    def note(part: str) -> str:
        found.extend(match.group(2) for match in LINK.finditer(part))
        return part

    outside_fences(text, note)
    for target in found:
        if (inside := in_repository(target, file)) is not None:
            yield inside


def in_repository(target: str, file: str) -> str | None:
    """Where a relative link of a file leads, as a path from the root; None for an address or an anchor."""
    path = target.partition("#")[0]
    if not path or re.match(r"[a-z]+:", target):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(file), path))


def copied(file: str) -> str | None:
    """The page or picture that shows a file that is not a page itself; None if there is no such file."""
    if not (ROOT / file).exists():
        return None
    suffix = Path(file).suffix
    return f"files/{file}" if suffix in PICTURES else f"files/{file}.md"


def file_page(file: str) -> str:
    """A file of the repository as a page, or the list of what is in a folder."""
    path = ROOT / file
    if path.is_dir():
        here = sorted(p.name for p in path.iterdir() if not p.name.startswith((".", "_")))
        return f"# {file}\n\n" + "\n".join(f"* `{name}`" for name in here) + "\n"
    text = path.read_text(encoding="utf-8").rstrip()
    language = LANGUAGES.get(path.suffix, "text")
    if path.suffix == ".ipynb":
        language, text = "json", json.dumps(json.loads(text), indent=1)
    return f"# {file}\n\n````{language}\n{text}\n````\n"


def linked_from(page: str, target: str, file: str) -> str:
    """A link of a file of the repository as a link between pages.

    Args:
        page: The page on which it stands.
        target: The link as written in the file.
        file: The file, as a path from the root.

    Returns:
        The link on the site. A link that leads nowhere is left as it is, so that the strict build reports it.
    """
    inside = in_repository(target, file)
    if inside is None:
        return target
    there = page_of(inside) or copied(inside)
    if there is None:
        return target
    anchor = target.partition("#")[2]
    return posixpath.relpath(there, posixpath.dirname(page) or ".") + (f"#{anchor}" if anchor else "")


def with_site_links(text: str, page: str, file: str) -> str:
    """A page's Markdown with the links of the site in place of those of the repository."""

    def change(part: str) -> str:
        return LINK.sub(lambda m: m.group(1) + linked_from(page, m.group(2), file) + m.group(3), part)

    return outside_fences(text, change)
