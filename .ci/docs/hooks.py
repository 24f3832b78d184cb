"""The site's build: pages are written from the repository when mkdocs asks for its files, links are turned into the site's, results are checked.

mkdocs calls these functions by their names (.mkdocs.yml, `hooks`). Warnings end a strict build.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import checks
import notebook_page
import site_map
from command_page import command_page
from method_pages import method_page, methods
from mkdocs.structure.files import File
from navigation import navigation
from paper_index import citation, paper_index
from reference_page import reference_page, where

import hf_continual

logger = logging.getLogger("mkdocs.hooks.hf_continual")
# Pages that no file of the repository holds; their links are written as those of a file of recipes/guide.
WRITTEN = {
    "papers.md": paper_index,
    "citation.md": citation,
    "commands.md": command_page,
    "reference.md": reference_page,
}
GUIDE = "recipes/guide/page.md"
ASSETS = ("site.css", "iframe-worker.js")


def on_config(config: Any) -> Any:
    """Put the pages in their order."""
    config.nav = navigation(site_map.sources())
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add every page and picture that is not in recipes/guide."""
    pages = all_pages()
    for page, (text, file) in pages.items():
        if files.get_file_from_path(page) is not None:
            files.remove(files.get_file_from_path(page))
        files.append(File.generated(config, page, content=site_map.with_site_links(text, page, file)))
    own = {f"assets/{name}": (Path(__file__).parent / name).read_bytes() for name in ASSETS}
    for name, content in {**own, **assets(pages)}.items():
        files.append(File.generated(config, name, content=content))
    return files


def all_pages() -> dict[str, tuple[str, str]]:
    """Every page: its text with the links of the repository, and the file that these links are relative to."""
    pages = {page: (site_map.text_of(file), file) for page, file in site_map.sources().items()}
    for name in methods():
        pages[f"methods/{name}.md"] = (method_page(name), f"recipes/{name}/README.md")
    pages |= {page: (write(), GUIDE) for page, write in WRITTEN.items()}
    return pages


def assets(pages: dict[str, tuple[str, str]]) -> dict[str, str | bytes]:
    """Files that pages link and that are not pages: pictures, and the text of recipes, scripts and modules."""
    found: dict[str, str | bytes] = {}
    for text, file in pages.values():
        for target in site_map.links(text, file):
            name = None if site_map.page_of(target) else site_map.copied(target)
            if name and name.endswith(".md"):
                found[name] = site_map.file_page(target)
            elif name:
                found[name] = (site_map.ROOT / target).read_bytes()
        if file.endswith(".ipynb"):
            found |= notebook_page.pictures(file)
    return found


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Report names of the library that are not there."""
    for name in checks.unresolved(markdown):
        logger.warning("%s: there is no %s", page.file.src_uri, name)
    return markdown


def on_post_build(config: Any) -> None:
    """Report public names without a place, and requests to other servers."""
    site = Path(config.site_dir)
    for name in checks.missing(site, {name: where(name) for name in hf_continual.__all__}):
        logger.warning("no page documents the public name %s", name)
    for request in checks.outside(site):
        logger.warning("a request to another server in %s", request)
