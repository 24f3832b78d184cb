"""Ratios of merging, measured in one run: against a plain copy of the same bytes, and against mergekit's linear merge.

    python tests/benchmarks/merging.py                    0.5 B parameters, and memory at 3 B
    python tests/benchmarks/merging.py --mergekit /path/to/mergekit-yaml

mergekit is no dependency; without it the comparison is left out and said so. Every case runs in a process of its own, the
cases take turns, and CPU time is that of the process and its children, imports included unless said otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.merging.synthetic import write_model

MIB = 2**20
# Reads both inputs, writes as many bytes as one has, waits for the disk; a megabyte at a time.
COPY = """
import os, sys
one, two, out = sys.argv[1:]
with open(one, "rb") as a, open(two, "rb") as b, open(out, "wb", buffering=0) as w:
    while piece := a.read(1 << 20):
        b.read(1 << 20)
        w.write(piece)
    os.fsync(w.fileno())
"""
SIZES = {"0.5 B": {"layers": 26}, "3 B": {"layers": 26, "hidden": 2560, "inner": 10_240}}


def timed(command: list[str]) -> tuple[float, float, str]:
    """Wall and CPU seconds of a process, and what it printed."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def mergekit_config(folder: Path, models: list[Path]) -> Path:
    """The same merge for mergekit."""
    file = folder / "mergekit.yaml"
    entries = "".join(
        f"  - model: {m}\n    parameters: {{weight: {w}}}\n" for m, w in zip(models, (0.4, 0.6), strict=True)
    )
    file.write_text(f"models:\n{entries}merge_method: linear\ndtype: bfloat16\n")
    return file


def compare(folder: Path, repeats: int, mergekit: str | None) -> None:
    """0.5 B parameters: copy, ours, mergekit, in turns."""
    models = [folder / "a", folder / "b"]
    elements, _ = (write_model(m, seed, **SIZES["0.5 B"]) for seed, m in enumerate(models))
    print(f"two bf16 models of {elements / 1e9:.3f} B parameters; load of the machine {os.getloadavg()[0]:.1f}")
    call, found = [sys.executable, "-m", "tests.merging.synthetic", "merge_linear!"], {}
    command = [sys.executable, "-m", "hf_continual", "merge", "linear", "--weights", "0.4,0.6", "--quiet"]
    for _ in range(repeats):
        turns: dict[str, list[str]] = {
            "import torch": [sys.executable, "-c", "import torch"],
            **({"import mergekit": [mergekit, "--help"]} if mergekit else {}),
            "copy": [sys.executable, "-c", COPY, *(str(m / "model.safetensors") for m in models), str(folder / "copy")],
            "ours": [*command, "--out", str(folder / "out"), *map(str, models)],
            "ours, call": [*call, str(folder / "out"), *map(str, models)],
        }
        if mergekit:
            turns["mergekit"] = [
                mergekit,
                str(mergekit_config(folder, models)),
                str(folder / "mk"),
                "--no-copy-tokenizer",
            ]
        for name, line in turns.items():
            wall, cpu, said = timed(line)
            inner = json.loads(said) if name == "ours, call" else {}
            found.setdefault(name, []).append({"wall": wall, "cpu": cpu, **{f"merge {k}": v for k, v in inner.items()}})
            for left in ("out", "mk"):
                shutil.rmtree(folder / left, ignore_errors=True)
            (folder / "copy").unlink(missing_ok=True)

    def median(name: str, key: str) -> float:
        return statistics.median(run[key] for run in found[name])

    for name in found:
        print(f"{name:14} wall {median(name, 'wall'):7.2f} s   CPU {median(name, 'cpu'):6.2f} s")
    merge = median("ours, call", "merge wall"), median("ours, call", "merge cpu")
    print(f"{'ours, merge':14} wall {merge[0]:7.2f} s   CPU {merge[1]:6.2f} s   (without importing torch)")
    pairs = [run["merge wall"] / copied["wall"] for run, copied in zip(found["ours, call"], found["copy"], strict=True)]
    print(f"wall of the merge / wall of the copy: {statistics.median(pairs):.2f}   (goal 2, better 1.3)")
    print(f"CPU of the merge / CPU of the copy: {merge[1] / median('copy', 'cpu'):.2f}")
    if mergekit:
        both = sorted(a["cpu"] / b["cpu"] for a, b in zip(found["ours"], found["mergekit"], strict=True))
        print(
            f"CPU of the commands, ours / mergekit, imports included: {statistics.median(both):.3f} "
            f"({both[0]:.3f} to {both[-1]:.3f})   (goal 0.333)"
        )
        without = median("mergekit", "cpu") - median("import mergekit", "cpu")
        print(f"CPU, ours / mergekit, without imports: {merge[1] / without:.3f}")
        print(f"wall, ours / mergekit: {median('ours', 'wall') / median('mergekit', 'wall'):.3f}")
    for model in models:
        shutil.rmtree(model)


def memory(folder: Path, size: str) -> None:
    """Peak of anonymous memory for a size of model."""
    models = [folder / f"{size}-{i}" for i in range(2)]
    elements, _ = (write_model(m, seed, **SIZES[size]) for seed, m in enumerate(models))
    for function in ("merge_linear", "merge_with_recall"):
        _, _, said = timed(
            [sys.executable, "-m", "tests.merging.synthetic", function, str(folder / "out"), *map(str, models)]
        )
        run: dict[str, Any] = json.loads(said)
        shutil.rmtree(folder / "out")
        print(
            f"{function}, {elements / 1e9:.2f} B: {run['memory'] / MIB:.1f} MiB above import torch, resident in all "
            f"{run['rss'] / 1e6:.0f} MB, {run['cpu']:.1f} CPU s, imported {run['imported']}"
        )
    for model in models:
        shutil.rmtree(model)


def main() -> None:
    """Print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mergekit", default=shutil.which("mergekit-yaml"), help="the command, in an environment of its own"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true", help="leave the memory of 0.5 B and 3 B out")
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        compare(folder, args.repeats, args.mergekit)
        if not args.mergekit:
            print(
                "mergekit is not installed: not compared. pip install mergekit in an environment of its own, then --mergekit"
            )
        for size in () if args.no_memory else SIZES:
            if shutil.disk_usage(folder).free > 25e9:
                memory(folder, size)
            else:
                print(f"{size}: NOT RUN, {shutil.disk_usage(folder).free / 1e9:.0f} GB are free and 25 are needed")


if __name__ == "__main__":
    main()
