"""Where TRL is missing, methods train on transformers' Trainer, and what needs TRL says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from importlib import metadata

real = metadata.version
def version(name):
    if name == "trl":
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.version = version
sys.modules["trl"] = None  # an import of it fails

import hf_continual
from tests.neighbours import world

trainer = world.learn(sys.argv[1], world.together(), save_strategy="steps", save_steps=2)
assert trainer.state.global_step == 4
for use in (
    lambda: hf_continual.ContinualTrainer,
    lambda: hf_continual.ContinualConfig,
    lambda: hf_continual.train_stream,
    lambda: __import__("hf_continual.evaluation.likelihood"),
):
    try:
        use()
    except ImportError as error:
        print(error)
    else:
        raise SystemExit("not refused")
"""


def test_methods_train_and_the_rest_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = [
        line
        for line in done.stdout.splitlines()
        if line.startswith("ContinualTrainer, with all that uses TRL, needs trl")
    ]
    assert len(said) == 4 and all("pip install 'trl" in line and "ContinualCallback" in line for line in said)
    assert (tmp_path / "continual" / "methods.json").is_file()
