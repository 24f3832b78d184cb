"""The page in a browser: nothing runs that is not its own, nothing is fetched, nothing overlaps, sorting and filtering work."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from hf_continual.report.write import write_report
from tests.report import world

CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome", "chrome") if (p := shutil.which(n))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)"),
]
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')

# Put at the end of a copy of the page that has no policy, so that only escaping protects it.
MEASURE = """
<script>
addEventListener("load", () => setTimeout(() => {
  document.querySelectorAll("details").forEach((part) => { part.open = true; });
  const found = {title: document.title, width: innerWidth, scroll: document.documentElement.scrollWidth, overlaps: [], outside: []};
  for (const svg of document.querySelectorAll("svg")) {
    const box = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].filter((t) => t.textContent.trim());
    const straight = texts.filter((t) => !/rotate\\((?!-?0[ ,)])/.test(t.getAttribute("transform") || "")).map((t) => [t, t.getBoundingClientRect()]);
    for (const t of texts) {
      const r = t.getBoundingClientRect();
      if (r.left < box.left - 2 || r.right > box.right + 2 || r.top < box.top - 2 || r.bottom > box.bottom + 2)
        found.outside.push(svg.getAttribute("aria-label") + ": " + t.textContent);
    }
    for (let i = 0; i < straight.length; i++) for (let j = i + 1; j < straight.length; j++) {
      const [s, a] = straight[i], [t, b] = straight[j];
      if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1.5 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
        found.overlaps.push(svg.getAttribute("aria-label") + ": " + s.textContent + " | " + t.textContent);
    }
  }
  for (const part of document.querySelectorAll("h1, h2, p, summary, figcaption, dd, .change, .filter, .scroll"))
    if (part.getBoundingClientRect().right > innerWidth + 1) found.outside.push(part.className + ": " + part.textContent.slice(0, 60));
  found.ink = getComputedStyle(document.body).color;
  const table = document.querySelector("table.sortable"), column = table.tHead.rows[0].cells.length - 1;
  const read = () => [...table.tBodies[0].rows].map((row) => row.cells[column].dataset.v);
  const button = table.tHead.rows[0].cells[column].querySelector("button");
  found.before = read(); button.click(); found.rising = read(); button.click(); found.falling = read();
  found.sort = button.closest("th").getAttribute("aria-sort");
  const form = document.getElementById("filter"), shown = () => document.querySelectorAll("article.change:not([hidden])").length;
  if (form) {
    found.all = shown();
    form.elements.task.selectedIndex = 1; form.dispatchEvent(new Event("input")); found.task = shown();
    found.tasks = new Set([...document.querySelectorAll("article.change:not([hidden])")].map((a) => a.dataset.task)).size;
    form.elements.text.value = "nothing says this"; form.dispatchEvent(new Event("input")); found.none = shown();
    found.count = document.getElementById("count").textContent;
  }
  parent.postMessage(JSON.stringify(found), "*");
}, 50));
</script>
"""
# A window is at least 500 pixels wide; a frame may be as narrow as a phone.
FRAME = """<!DOCTYPE html><meta name="color-scheme" content="light dark"><iframe src="PAGE" style="border: 0; width: WIDTHpx; height: 1000px"></iframe>
<script>addEventListener("message", (event) => {
  const out = document.createElement("pre"); out.id = "measured"; out.textContent = event.data; document.body.append(out);
});</script>"""


def browse(page: Path, profile: Path, width: int = 1280, dark: bool = False) -> tuple[str, str]:
    """The page after its scripts ran, and what the browser said about it."""
    ran = subprocess.run(
        [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={width},1000", "--enable-logging=stderr",
            "--virtual-time-budget=8000", "--dump-dom", page.resolve().as_uri(),
        ],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout, ran.stderr


def measured(page: Path, folder: Path, width: int = 1280, dark: bool = False) -> dict:
    """What `MEASURE` found in a copy of the page without its policy."""
    bare = POLICY.sub("", page.read_text(encoding="utf-8"))
    assert "Content-Security-Policy" not in bare
    copy, frame = (folder / f"{what}-{page.stem}-{width}-{dark}.html" for what in ("copy", "frame"))
    copy.write_text(bare.replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    frame.write_text(FRAME.replace("PAGE", copy.name).replace("WIDTH", str(width)), encoding="utf-8")
    seen = browse(frame, folder / "profile", width + 40, dark)[0]
    found = re.search(r'<pre id="measured">(.*?)</pre>', seen, re.DOTALL)
    assert found
    return json.loads(html.unescape(found[1]))


@pytest.fixture(scope="module")
def asked():
    """A server on this machine, and the paths it was asked for."""
    paths: list[str] = []

    class Listening(BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Listening)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, paths
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, asked):
    folder, address = tmp_path_factory.mktemp("hostile"), f"http://127.0.0.1:{asked[0]}/x"
    text = (
        f'</pre></dd></title></style></text></svg><script>document.title="pwned";fetch("{address}")</script>'
        f'<img src="{address}" onerror="document.title=\'pwned\'"><style>@import "{address}";</style> $x^{{2$ \u202e {{{{7*7}}}} 漢字'
    )
    names = (
        "<svg onload=document.title='pwned'>",
        '" onmouseover="document.title=1',
        "'><img src=x onerror=document.title=2>",
    )
    for name in ("<b>one", "two"):
        world.run(folder / name, names, keep=0.4, text=text, model=text)
        world.gauges_during(folder / name, text)
        world.merged(folder / name, text=text)
    write_report([folder / "<b>one", folder / "two"], folder / "page.html", title=text)
    return folder


def test_hostile_text_runs_nothing_even_without_the_policy(hostile, asked):
    found = measured(hostile / "page.html", hostile)
    assert found["title"].startswith("</pre></dd>") and "{{7*7}}" in found["title"]  # the text itself, all of it
    assert asked[1] == []
    assert found["scroll"] <= found["width"] and not found["outside"]


def test_the_policy_lets_the_pages_own_script_run_and_is_never_broken(hostile, asked):
    _, said = browse(hostile / "page.html", hostile / "profile")
    assert not re.search(r"Content Security Policy|violates|Refused|CONSOLE.*[Ee]rror", said), said[-2000:]
    assert asked[1] == []


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, keep in (("plain", 0.3), ("replay", 0.9)):
        world.run(folder / name, keep=keep)
        world.gauges_during(folder / name)
    world.merged(folder / "replay")
    write_report([folder / "plain", folder / "replay"], folder / "pair.html")
    names = [f"{'a long benchmark name ' * (i % 3 == 0)}task {i:02d}" for i in range(20)]
    methods = [f"method-{i}" for i in range(5)] + ["a method with a long name"]
    for i, method in enumerate(methods):
        world.run(folder / method, names, keep=0.5 + 0.08 * i, rows=6, seed=i)
    write_report([folder / m for m in methods], folder / "many.html")
    world.sweep(folder / "sweep", {"plain": 0.3, "replay": 0.9, "ewc": 0.6})
    write_report([folder / "sweep"], folder / "sweep.html")
    world.demo(folder / "demo")
    write_report([folder / "demo"], folder / "demo.html")
    return folder


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["pair", "many", "sweep", "demo"])
def test_nothing_overlaps_and_nothing_sticks_out(pages, name, width, dark):
    found = measured(pages / f"{name}.html", pages, width, dark)
    assert found["scroll"] <= found["width"] == width
    assert not found["overlaps"] and not found["outside"]
    bright = sum(map(int, re.findall(r"\d+", found["ink"])[:3])) > 380
    assert bright == dark


def test_sorting_and_filtering(pages):
    found = measured(pages / "pair.html", pages)
    rising = sorted(found["before"], key=float)
    assert found["rising"] == rising and found["falling"] == rising[::-1] and found["sort"] == "descending"
    assert found["all"] > found["task"] > 0 and found["tasks"] == 1 and found["none"] == 0
    assert found["count"] == f"0 of {found['all']}"
