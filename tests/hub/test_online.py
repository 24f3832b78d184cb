"""Starts the processes that push to the loopback Hub; see `tests/hub/plugin.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # each is a whole test file
@pytest.mark.parametrize("name", sorted(p.stem for p in (HERE / "online").glob("test_*.py")))
def test_online(name):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTEST_", "TRANSFORMERS_"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.hub.plugin", str(HERE / "online" / f"{name}.py")]
    kept["PYTHONPATH"] = f"{ROOT}{os.pathsep}{kept.get('PYTHONPATH', '')}"
    ran = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
