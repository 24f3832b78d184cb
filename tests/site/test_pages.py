"""The pages of the site, before they are built: links lead somewhere, names exist, nothing is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import hf_continual
from hf_continual.methods.compose import STATIONS, hooks
from hf_continual.methods.table import TABLE, method_class

ROOT = Path(__file__).parents[2]


def words(text):
    """A heading as an anchor."""
    plain = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).lower().replace("`", "")).strip()
    return re.sub(r"[-\s]+", "-", plain)


@pytest.fixture(scope="module")
def pages():
    """Every page of the site but the reference: page -> (Markdown, the file that its links are relative to)."""
    import method_pages
    import site_map
    from command_page import command_page
    from paper_index import citation, paper_index

    found = {page: (site_map.text_of(file), file) for page, file in site_map.sources().items()}
    for name in method_pages.methods():
        found[f"methods/{name}.md"] = (method_pages.method_page(name), f"recipes/{name}/README.md")
    for page, write in (("papers.md", paper_index), ("citation.md", citation), ("commands.md", command_page)):
        found[page] = (write(), "recipes/guide/page.md")
    return found


def test_every_link_leads_somewhere(pages):
    """What the strict build checks too, without the packages that it needs; anchors of headings included."""
    import site_map

    anchors = {
        page: {words(h) for h in re.findall(r"^#+ (.*)$", text, re.M)} | set(re.findall(r"\{ #(\S+) \}", text))
        for page, (text, _) in pages.items()
    }
    lost = []
    for page, (text, file) in pages.items():
        changed = site_map.with_site_links(text, page, file)
        for target in re.findall(r"\]\(([^)\s]+)\)", "".join(site_map.FENCE.split(changed)[::2])):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            there = (
                site_map.posixpath.normpath(site_map.posixpath.join(site_map.posixpath.dirname(page), path))
                if path
                else page
            )
            known = (
                there in pages
                or there == "reference.md"
                or (ROOT / there.removeprefix("files/").removesuffix(".md")).exists()
            )
            if not known or (anchor and there in anchors and anchor not in anchors[there]):
                lost.append(f"{file}: {target}")
    assert not lost, lost


def test_every_name_of_the_library_exists(pages):
    import checks

    assert not {page: bad for page, (text, _) in pages.items() if (bad := checks.unresolved(text))}
    assert checks.unresolved("`hf_continual.methods.base.Method` `hf_continual.gone` `hf_continual.Task.gone()`") == [
        "hf_continual.Task.gone", "hf_continual.gone",
    ]  # fmt: skip


def test_a_link_that_leads_nowhere_is_not_changed():
    from site_map import with_site_links

    said = with_site_links(
        "[a](gone.md) [b](../replay) [c](../replay/lora.yaml)\n```\n[d](../replay)\n```\n",
        "faq.md",
        "recipes/guide/faq.md",
    )
    assert (
        said == "[a](gone.md) [b](methods/replay.md) [c](files/recipes/replay/lora.yaml.md)\n```\n[d](../replay)\n```\n"
    )


@pytest.mark.parametrize("name", TABLE)
def test_a_methods_page(name, pages):
    text, _ = pages[f"methods/{name}.md"]
    cls = method_class(name)
    for part in (
        "**Idea.**",
        "## Options",
        "## Cost and processes",
        "## When not to use it",
        "## Paper and code",
        "<svg",
        "```yaml",
    ):
        assert part in text, part
    assert f"::: {cls.__module__}.{cls.__qualname__}" in text
    assert text.count('class="acts"') == len(hooks(cls))


def test_the_picture_has_every_hook():
    from hook_picture import ROWS, picture

    assert {title for titles in ROWS.values() for title in titles} == set(STATIONS.values())
    with pytest.raises(ValueError, match="no place for nowhere"):
        picture("own", ["nowhere"])


def test_the_picture_of_learning_and_keeping_is_that_of_the_table(pages):
    """Every arm is a dot at its place: higher for more learned, further right for more lost."""
    from frontier_picture import arms, picture

    drawn = picture("kl_to_base")
    found = {
        said.partition(":")[0]: (float(x), float(y))
        for x, y, said in re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="\d"><title>([^<]+)', drawn)
    }
    assert set(found) == {arm.name for arm in arms()} and drawn.count('class="named"') == 1
    for one in arms():
        for other in arms():
            if one.learned > other.learned:
                assert found[one.name][1] < found[other.name][1]
            if one.lost > other.lost:
                assert found[one.name][0] > found[other.name][0]
    assert picture("lamol") == "" and drawn in pages["methods/kl_to_base.md"][0]


def test_every_method_has_its_cost(pages):
    from method_pages import cost_rows

    assert not [name for name in TABLE if not cost_rows(name, method_class(name))]


def test_the_index_has_every_paper(pages):
    text, _ = pages["papers.md"]
    for name in TABLE:
        cls = method_class(name)
        assert f"{{ #{name} }}" in text and cls.paper.title in text, name
    assert all(f"recipes/{name}/" in text for name in TABLE)
    assert "**" not in pages["citation.md"][0] and pages["citation.md"][0].count("@misc") >= len(TABLE) - 4


def test_the_table_of_methods_is_that_of_the_classes():
    """recipes/guide/methods.md is written by hand: names, classes, hooks and addresses are those of the code."""
    lines = (ROOT / "recipes" / "guide" / "methods.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("| `")]
    assert [row[0].strip("`") for row in rows] == list(TABLE)
    for name, row in zip(TABLE, rows, strict=True):
        cls = method_class(name)
        assert row[1] == f"`{cls.__name__}`", name
        assert cls.paper.url is None or f"]({cls.paper.url})" in row[3], (
            f"{name}: its row does not link to {cls.paper.url}."
        )


def test_every_public_name_has_a_place():
    from reference_page import groups, method_names, reference_page

    named = [name for names in groups().values() for name in names]
    assert sorted(named + [n for n in method_names() if n in hf_continual.__all__]) == sorted(hf_continual.__all__)
    assert reference_page().count(":::") == len(named)


def test_the_navigation_has_every_page_once(pages):
    from navigation import navigation, pages_of
    from site_map import sources

    listed = pages_of(navigation(sources()))
    assert sorted(listed) == sorted({*pages, "reference.md"})
    with pytest.raises(ValueError, match="lists .*which recipes/guide does not hold"):
        navigation({"index.md": "README.md"})


def test_a_new_recipe_is_a_page(tmp_path, monkeypatch):
    import site_map

    for name in ("README.md", "recipes/new/README.md", "recipes/replay/README.md", "recipes/choosing.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("# New\n", encoding="utf-8")
    monkeypatch.setattr(site_map, "ROOT", tmp_path)
    monkeypatch.setattr(site_map, "GUIDE", tmp_path / "recipes" / "guide")
    assert set(site_map.sources()) == {"index.md", "recipes/new.md", "methods/replay.md", "choosing.md"}


@pytest.mark.parametrize(
    ("name", "text", "number"),
    [
        ("a.html", '<script src="https://x.y/z.js"></script><a href="https://x.y">z</a>', 1),
        ("a.html", '<link rel="preconnect" href="//fonts.x"><link rel="canonical" href="https://x.y">', 1),
        ("a.html", '<style>@import "https://x.y/z.css";</style><p style="background: url(https://x.y)">', 2),
        ("a.css", "a { background: url('https://x.y/z.png') } b { background: url(data:image/png;base64,x) }", 1),
        ("a.html", '<img src="z.png"><img srcset="//x.y/z.png 2x">', 1),
    ],
)
def test_requests_to_other_servers_are_found(name, text, number, tmp_path):
    import checks

    (tmp_path / name).write_text(text, encoding="utf-8")
    assert len(list(checks.outside(tmp_path))) == number


def test_the_configuration_is_strict_and_offline():
    config = yaml.safe_load((ROOT / ".mkdocs.yml").read_text(encoding="utf-8"))
    assert config["strict"] and config["theme"]["font"] is False and config["site_dir"] == "build/docs"
    assert set(config["validation"]["links"].values()) == {"warn"}
    pins = (ROOT / ".ci" / "docs" / "requirements.txt").read_text(encoding="utf-8").split()
    assert all("==" in pin for pin in pins) and any(pin.startswith("mkdocs-material==") for pin in pins)


def test_make_docs_is_strict():
    """With ``--quiet`` mkdocs counts no warnings, and a broken link passes."""
    (line,) = re.findall(r".*mkdocs build.*", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert "--strict" in line and "--quiet" not in line
