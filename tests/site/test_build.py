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


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)")
@pytest.mark.parametrize(
    "page", ["index.html", "methods/kl_to_base.html", "papers.html", "reference.html", "notebooks/01_first_task.html"]
)
def test_a_browser_asks_no_server(site, page, tmp_path):
    """Every name resolves to a port here that counts connections; the search works from the disk."""
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as door:

        def count():
            while True:
                try:
                    asked.append(door.accept()[0])
                except OSError:
                    return

        threading.Thread(target=count, daemon=True).start()
        rules = f"--host-resolver-rules=MAP * 127.0.0.1:{door.getsockname()[1]}"
        arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
        ]
        arguments += [
            "--no-first-run",
            "--disable-sync",
            f"--user-data-dir={tmp_path}",
            rules,
            "--virtual-time-budget=5000",
            "--dump-dom",
        ]
        shown = subprocess.run(
            [CHROMIUM, *arguments, f"{(site / page).as_uri()}?q=replay"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert not asked
    assert "md-content" in shown.stdout and len(re.findall("md-search-result__item", shown.stdout)) > 1
