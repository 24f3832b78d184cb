"""Start-up cost of a command: CPU time of `--help` and of errors, as ratios to starting Python.

    python tests/benchmarks/startup.py

Every round runs all commands once; prints the median and the range over the rounds.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "--help": ["-m", "hf_continual", "--help"],
    "run with a misspelled key": ["-m", "hf_continual", "run", "plan.yaml"],
    "train without its rows": ["-m", "hf_continual", "train", "--model", "x", "--train", "gone.jsonl"],
    "import torch": ["-c", "import torch"],
}


def seconds(command: list[str], folder: Path) -> float:
    """CPU seconds of a Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *command], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "plan.yaml").write_text("modle: x\noutput_dir: out\ntasks: []\n")
        taken = [{name: seconds(command, folder) for name, command in COMMANDS.items()} for _ in range(rounds)]
    for name in COMMANDS:
        ratios = [found[name] / found["python -c pass"] for found in taken]
        print(
            f"{name:28} {statistics.median(found[name] for found in taken):6.2f} CPU s   "
            f"{statistics.median(ratios):6.1f} ({min(ratios):.1f} to {max(ratios):.1f}) times python -c pass"
        )


if __name__ == "__main__":
    main()
