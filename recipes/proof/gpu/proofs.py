"""Proof runs on one card: several processes of run.py share the work, and their results are collected as they come.

    python recipes/proof/gpu/proofs.py longseq|biography          # on the GPU machine; called by run.sh
    python recipes/proof/gpu/proofs.py --split proof.json FOLDER  # afterwards: one result file per run, as render.py reads them

`proof.json` and `biography.json` hold all result files of their runs, because few files come back from such a machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
STAGGER = 1.0  # seconds between the starts of two processes: the first makes what all share


def command(what: str, out: Path, data: Path, tiny: bool) -> list[str]:
    """The command that every process runs."""
    preset = {"longseq": ("gpu-short", "smoke"), "biography": ("gpu-biography-short", "smoke-biography")}[what][tiny]
    preset = os.environ.get(f"GPU_PRESET_{what.upper()}", preset)
    given = ["--data", str(data), *(("--data-sets", "longseq") if what == "longseq" else ())]
    arms = ["--arms", *os.environ["GPU_ARMS"].split()] if os.environ.get("GPU_ARMS") else []
    return [sys.executable, str(HERE.parent / "run.py"), "--preset", preset, "--out", str(out), *given, *arms]


def collect(results, folder: Path) -> None:
    """Add result files that are not there yet."""
    for file in sorted(folder.glob("*.json")):
        if file.stem not in results.content["found"]:
            results.add(file.stem, json.loads(file.read_text(encoding="utf-8")))
            print(file.stem, flush=True)


def main() -> int:
    """Run one of the two, until its work or its time is finished."""
    from results import Results, seconds_left, tiny

    what, begun = sys.argv[1], time.monotonic()
    work = Path(os.environ.get("GPU_WORK", "out"))
    out = work / f"{what}-{os.environ.get('GPU_SIZE', 'full')}"
    number = int(os.environ.get("GPU_PROCESSES", "2" if tiny() else "8"))
    results = Results("proof" if what == "longseq" else "biography")
    out.mkdir(parents=True, exist_ok=True)
    running = []
    try:
        for i in range(number):
            with (out / f"process-{i}.log").open("w") as log:
                running.append(
                    subprocess.Popen(command(what, out, work / "data", tiny()), stdout=log, stderr=subprocess.STDOUT)
                )
            time.sleep(STAGGER)
        while any(p.poll() is None for p in running) and seconds_left(begun) > 2:
            collect(results, out / "results")
            time.sleep(0.5)
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()  # the same command resumes
        collect(results, out / "results")
    codes = [p.wait() for p in running]
    for i, code in enumerate(codes):
        if code > 0:
            print(
                f"process {i} ended with exit code {code}:\n{(out / f'process-{i}.log').read_text()[-1500:]}",
                file=sys.stderr,
            )
    return 1 if any(code > 0 for code in codes) else 0


def split(source: Path, folder: Path) -> None:
    """Write each run of a collected file as a result file, with the facts of the machine."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads(source.read_text(encoding="utf-8"))
    for name, found in content["found"].items():
        (folder / f"{name}.json").write_text(json.dumps({**found, "machine": content["about"]}), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--split"]:
        split(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(main())
