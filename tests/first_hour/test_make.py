"""Every Makefile target is run, by CI or by a test: an unchecked target is a defect."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)[1].split()  # pyrefly: ignore
# Target -> the file that runs it, or its commands, and text in that file that proves it.
RUN_BY = {
    "help": ("tests/first_hour/test_make.py", "test_help_lists_every_target"),
    "install": (".ci/run", "make check"),  # every target installs first
    "check": (".ci/run", "make check"),
    "docs": (".ci/run", "make docs"),
    "build": (".ci/run", "make build"),
    "test": (".ci/run", "make test"),
    "test-fast": (".ci/run", "make test"),  # a part of it
    "test-all": (".ci/run", "make test"),  # what is exhaustive in it runs before a release
    "test-versions": ("tests/first_hour/test_make.py", "test_versions_are_those_of_the_project"),
    "format": ("tests/first_hour/test_make.py", "test_every_target_names_what_exists"),
    "demo": ("tests/demo/test_demo.py", "main("),
    "cards": ("tests/hub/test_card.py", "cards"),
    "bench": ("tests/first_hour/test_make.py", "test_every_benchmark_compiles"),
    "proof": ("tests/proof/test_run.py", "recipes/proof/run.py"),
    "gpu-pack": ("tests/proof/test_gpu_pack.py", "gpu-pack"),
    "clean": ("tests/first_hour/test_make.py", "test_clean_keeps_the_checkout"),
}


def make(*arguments, folder=ROOT):
    """Run make with this interpreter's environment treated as installed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    command = ["make", "-o", f"{Path(sys.prefix)}/.hf_continual_installed", *arguments]
    return subprocess.run(
        command, cwd=folder, env={**environment, "VIRTUAL_ENV": sys.prefix}, capture_output=True, text=True, check=False
    )


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def test_every_target_is_run():
    assert set(RUN_BY) == set(TARGETS)
    for target, (file, words) in RUN_BY.items():
        assert words in (ROOT / file).read_text(encoding="utf-8"), target


@needs_make
def test_help_lists_every_target():
    said = make("help").stdout
    assert all(re.search(rf"^{target} ", said, re.M) for target in TARGETS)


@needs_make
@pytest.mark.parametrize("target", TARGETS)
def test_every_target_names_what_exists(target):
    done = make("-n", target)
    assert done.returncode == 0, done.stderr
    for file in re.findall(r"(?<![\w/])((?:tests|\.ci)/[\w./]+\.(?:py|txt))", done.stdout):
        assert (ROOT / file).is_file(), file


@needs_make
def test_clean_keeps_the_checkout(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("build", "dist", "demo-out", "hf_continual", "out"):
        (tmp_path / name).mkdir()
    assert make("clean", folder=tmp_path).returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Makefile", "hf_continual", "out"]


def test_every_benchmark_compiles():
    for script in (ROOT / "tests" / "benchmarks").glob("*.py"):
        compile(script.read_text(encoding="utf-8"), str(script), "exec")


def test_versions_are_those_of_the_project():
    """`make test-versions` reads pyproject.toml, and every test that it runs exists."""
    sys.path.insert(0, str(ROOT / ".ci"))
    try:
        import test_versions  # pyrefly: ignore[missing-import]
    finally:
        sys.path.pop(0)
    assert all((ROOT / name).exists() for name in (*test_versions.TESTS, *test_versions.WITHOUT_TRL))
    assert any(line.startswith("torch") for line in test_versions.requirements())
    lowest, highest = (test_versions.environment("3.11", end) for end in ("lowest", "highest"))
    assert any(line.startswith("trl") for line in test_versions.requirements())
    assert not any(line.startswith("trl") for line in test_versions.requirements("without-trl"))
    assert lowest != highest and ROOT not in lowest.parents
