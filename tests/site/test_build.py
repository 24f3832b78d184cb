"""The built site: strict, complete, and in a browser without a request to another server."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(600)]  # .ci/run calls make docs itself


def build(site, folder=ROOT):
    """Build the site of a checkout into a folder."""
    pytest.importorskip("mkdocs", reason="mkdocs is installed by make docs")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is installed by make docs")
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-f",
        ".mkdocs.yml",
        "-d",
        str(site),
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_it_holds_every_page(site):
    for page in (
        "index",
        "quickstart",
        "choosing",
        "papers",
        "commands",
        "reference",
        "faq",
        "methods/replay",
        "recipes/recall",
    ):
        assert (site / f"{page}.html").is_file(), page
    assert 'id="hf_continual.trainer.trainer.ContinualTrainer"' in (site / "reference.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[lost](gone.md)", "gone.md"),
        ("[lost](faq.md#nowhere)", "nowhere"),
        ("`hf_continual.nowhere.Gone`", "there is no hf_continual.nowhere.Gone"),
        ("![x](https://example.org/x.png)", "a request to another server in changelog.html: https://example.org/x.png"),
        ("[Gone][hf_continual.Gone]", "Could not find cross-reference target 'hf_continual.Gone'"),
    ],
)
def test_a_defect_ends_the_build(line, said, tmp_path):
    for name in ("README.md", ".mkdocs.yml", "recipes", "notebooks", "model_cards", ".ci", "hf_continual"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    with (tmp_path / "recipes" / "guide" / "changelog.md").open("a", encoding="utf-8") as page:
        page.write(f"\n{line}\n")
    done = build(tmp_path / "site", tmp_path)
    assert done.returncode != 0 and said in done.stderr, done.stderr[-2000:]


def browse(address, profile):
    """What a browser shows, and the servers it asked: every name resolves to a port here that reads the name and hangs up."""
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as door:

        def listen():
            while True:
                try:
                    caller = door.accept()[0]
                except OSError:
                    return
                with caller:
                    caller.settimeout(2)
                    said = b""
                    try:  # the greeting, which holds the server's name; of TLS the whole first record
                        while len(said) < 5 or (said[0] == 0x16 and len(said) < 5 + int.from_bytes(said[3:5], "big")):
                            more = caller.recv(4096)
                            said += more
                            if not more:
                                break
                    except TimeoutError:
                        pass
                    asked.append(said)

        threading.Thread(target=listen, daemon=True).start()
        arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--no-first-run",
        ]
        arguments += [f"--host-resolver-rules=MAP * 127.0.0.1:{door.getsockname()[1]}", f"--user-data-dir={profile}"]
        arguments += ["--virtual-time-budget=5000", "--dump-dom", address]
        shown = subprocess.run([CHROMIUM, *arguments], capture_output=True, text=True, timeout=240, check=False).stdout
    # The browser asks these itself, also for an empty page.
    return shown, [said for said in asked if said and b".google.com" not in said and b".gvt1.com" not in said]


needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)"
)
PAGES = ("index", "methods/kl_to_base", "papers", "reference", "notebooks/01_first_task")


@needs_chromium
@pytest.mark.parametrize("page", PAGES)
def test_a_browser_asks_no_server(site, page, tmp_path):
    """And the search works from the disk."""
    shown, asked = browse(f"{(site / page).as_uri()}.html?q=replay", tmp_path)
    assert not asked
    assert "md-content" in shown and len(re.findall("md-search-result__item", shown)) > 1


@needs_chromium
def test_a_page_that_asks_one_is_noticed(tmp_path):
    (tmp_path / "page.html").write_text('<script src="https://unpkg.com/x.js"></script>', encoding="utf-8")
    assert any(b"unpkg.com" in said for said in browse((tmp_path / "page.html").as_uri(), tmp_path / "profile")[1])
