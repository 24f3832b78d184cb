"""A figure as SVG that can stand in a page: unique ids, colours of the page's theme, no address, no style sheet."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping

from markupsafe import Markup
from matplotlib.figure import Figure

from hf_continual.report.run import clean
from hf_continual.report.style import GRID, INK, MUTED, PALETTE

_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
THEMED = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    "#999999": "var(--muted)",
    "#595959": "var(--muted)",
}
THEMED |= {colour.lower(): f"var(--c{i})" for i, colour in enumerate(PALETTE[:-1])}
_COLOUR = re.compile(r"#[0-9a-f]{6}", re.IGNORECASE)
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


def as_svg(figure: Figure) -> str:
    """A figure as SVG, the same bytes for the same picture."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return out.getvalue()


def file_svg(text: str) -> str:
    """The SVG as a file: on white, so that it can be read on any page."""
    head, found, rest = text.partition("<defs>")
    return f'{head}<rect width="100%" height="100%" fill="#ffffff"/>{found}{rest}' if found else text


def inline_svg(text: str, prefix: str, title: str, themed: Mapping[str, str] | None = None) -> Markup:
    """The SVG for a page.

    Args:
        text: As `as_svg` gives it.
        prefix: What ids begin with, so that those of two pictures differ.
        title: What a screen reader says.
        themed: Colour -> what stands for it in the page's style sheet; by default `THEMED`.

    Returns:
        Markup; texts in it are escaped, and it holds neither scripts nor links to elsewhere.
    """
    root, themed = ET.fromstring(text), THEMED if themed is None else themed
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        _rewrite(element, prefix, themed)
    width, height = (float(root.attrib[side].removesuffix("pt")) * 4 / 3 for side in ("width", "height"))
    box = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib |= {
        "viewBox": box, "width": f"{width:.0f}", "height": f"{height:.0f}", "role": "img", "aria-label": clean(title),
        # On a narrow screen it shrinks as long as its text can be read; after that its box scrolls.
        "style": f"min-width:{0.72 * width:.0f}px",
    }  # fmt: skip
    return Markup(ET.tostring(root, encoding="unicode"))


def _rewrite(element: ET.Element, prefix: str, themed: Mapping[str, str]) -> None:
    for name, value in list(element.attrib.items()):
        if name == "id":
            element.attrib[name] = f"{prefix}{value}"
        elif name == f"{_XLINK}href":
            del element.attrib[name]
            element.attrib["href"] = f"#{prefix}{value[1:]}" if value.startswith("#") else value
        elif name in ("style", "fill", "stroke"):
            value = _COLOUR.sub(lambda found: themed.get(found[0].lower(), found[0]), value)
            element.attrib[name] = _REFERENCE.sub(rf"url(#{prefix}\1)", value)
        elif "url(#" in value:
            element.attrib[name] = _REFERENCE.sub(rf"url(#{prefix}\1)", value)
