"""Ratios of merging, measured in one run: against a plain copy of the same bytes, and against mergekit's merge by the same rule.

    python tests/benchmarks/merging.py                    0.5 B parameters, and memory at 3 B
    python tests/benchmarks/merging.py --mergekit /path/to/mergekit-yaml
    python tests/benchmarks/merging.py --rules ties dare_ties --no-memory
    python tests/benchmarks/merging.py --rules --no-memory --blocks 10      an adapter into 10 of the 80 blocks of a 70B model

mergekit is not a dependency; without it the comparison is skipped, with a note. Every case runs in its own process, the
cases take turns, and CPU time is that of the process and its children, including imports unless noted otherwise.
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

from tests.merging.synthetic import OPTIONS, WITHOUT_BASE, write_model

MIB = 2**20
# Reads all inputs, writes as many bytes as one has, waits for the disk; a megabyte at a time.
COPY = """
import os, sys
*names, out = sys.argv[1:]
first, *others = (open(name, "rb") for name in names)
with open(out, "wb", buffering=0) as w:
    while piece := first.read(1 << 20):
        for other in others:
            other.read(1 << 20)
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


# mergekit's name of the same rule, with its parameters per model and for all.
THEIRS: dict[str, tuple[str, str, str]] = {
    "linear": ("linear", "weight: 0.5", ""),
    "task_arithmetic": ("task_arithmetic", "weight: 0.5", ""),
    "ties": ("ties", "weight: 1.0, density: 0.2", ""),
    "dare": ("dare_linear", "weight: 0.5, density: 0.3", ""),
    "dare_ties": ("dare_ties", "weight: 1.0, density: 0.3", "normalize: true"),
    "della": ("della", "weight: 1.0, density: 0.3, epsilon: 0.07", ""),
    "breadcrumbs": ("breadcrumbs", "weight: 0.3, density: 0.1, gamma: 0.01", ""),
    "slerp": ("slerp", "", "t: 0.4"),
    "model_stock": ("model_stock", "", ""),
}


def their_config(folder: Path, rule: str, base: Path, models: list[Path]) -> Path:
    """The merge of a rule for mergekit."""
    name, each, shared = THEIRS[rule]
    file = folder / "mergekit.yaml"
    lines = ["models:", *(f"  - {{model: {m}, parameters: {{{each}}}}}" for m in models), f"merge_method: {name}"]
    if rule != "linear":
        lines.append(f"base_model: {models[0] if rule in WITHOUT_BASE else base}")
    file.write_text("\n".join([*lines, f"parameters: {{{shared}}}", "dtype: bfloat16", ""]))
    return file


def ratio(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):5.2f} ({min(values):.2f} to {max(values):.2f})"


def rules(folder: Path, repeats: int, mergekit: str | None, names: list[str]) -> None:
    """Every rule against a copy that reads the same number of models, in turns."""
    base, *models = (folder / n for n in ("base", "a", "b"))
    elements, *_ = (write_model(m, seed, **SIZES["0.5 B"]) for seed, m in enumerate((base, *models)))
    print(
        f"base and two bf16 models of {elements / 1e9:.3f} B parameters; load of the machine {os.getloadavg()[0]:.1f}"
    )
    weights = [str(m / "model.safetensors") for m in (*models, base)]
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(repeats):
        idle = timed([mergekit, "--help"])[1] if mergekit else 0.0
        for rule in names:
            copied = timed(
                [sys.executable, "-c", COPY, *weights[: 2 if rule in WITHOUT_BASE else 3], str(folder / "copy")]
            )
            (folder / "copy").unlink()
            of = models if rule in WITHOUT_BASE else [base, *models]
            said = timed(
                [sys.executable, "-m", "tests.merging.synthetic", f"{rule}!", str(folder / "out"), *map(str, of)]
            )
            shutil.rmtree(folder / "out")
            run = json.loads(said[2])
            run |= {
                "copy": copied[0],
                "copy cpu": copied[1],
                "theirs": float("nan"),
                "looked": run["wall"] - run["written in"],
            }
            if mergekit and rule in THEIRS:
                file = their_config(folder, rule, base, models)
                run["theirs"] = timed([mergekit, str(file), str(folder / "mk"), "--no-copy-tokenizer"])[1] - idle
                shutil.rmtree(folder / "mk")
            found.setdefault(rule, []).append(run)
    print(
        "rule: wall of writing / copy; of all with its passes / copy; seconds of all, CPU seconds; CPU ours / mergekit"
    )
    for rule, runs in found.items():
        print(
            f"{rule:16} {ratio([r['written in'] / r['copy'] for r in runs])}   {ratio([r['wall'] / r['copy'] for r in runs])}   "
            f"{statistics.median(r['wall'] for r in runs):6.2f} s   {statistics.median(r['cpu'] for r in runs):6.2f} CPU s   "
            f"{ratio([r['cpu'] / r['theirs'] for r in runs])}"
        )
    print(f"copy: {ratio([r['copy'] for runs in found.values() for r in runs])} s")
    for model in (base, *models):
        shutil.rmtree(model)


def adapter_into(folder: Path, blocks: int) -> None:
    """Resident memory of merging an adapter into some blocks of a model as wide as Llama 3 70B; the base is a sparse file."""
    base, adapter = folder / "wide", folder / "adapter"
    size = {"hidden": 8192, "inner": 28_672, "vocab": 128_256, "layers": blocks}
    elements = write_model(base, 0, sparse=True, **size)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_attention_heads": 64, "num_key_value_heads": 64}))
    make = [sys.executable, "-m", "tests.merging.synthetic", "write adapter", str(adapter), json.dumps(size)]
    timed(make)
    wall, _, said = timed(
        [sys.executable, "-m", "tests.merging.synthetic", "adapter", str(folder / "out"), str(base), str(adapter)]
    )
    run = json.loads(said)
    shutil.rmtree(folder / "out")
    print(
        f"adapter of rank 16 on all linear layers into {elements / 1e9:.1f} B parameters ({blocks} blocks of 80): "
        f"{run['memory'] / MIB:.0f} MiB above import torch, {run['rss'] / 1e6:.0f} MB resident in all, {wall:.0f} s"
    )
    shutil.rmtree(base)


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


def memory(folder: Path, size: str, names: list[str]) -> None:
    """Peak of anonymous memory for a size of model."""
    models = [folder / f"{size}-{i}" for i in range(3)]
    elements, *_ = (write_model(m, seed, **SIZES[size]) for seed, m in enumerate(models))
    for function in ("merge_linear", "merge_with_recall", *names):
        of = models if function in OPTIONS and function not in WITHOUT_BASE else models[1:]
        _, _, said = timed(
            [sys.executable, "-m", "tests.merging.synthetic", function, str(folder / "out"), *map(str, of)]
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
    parser.add_argument("--rules", nargs="*", default=list(OPTIONS), choices=list(OPTIONS), help="by default all")
    parser.add_argument("--commands", action="store_true", help="the commands for a linear merge too, imports included")
    parser.add_argument(
        "--blocks", type=int, help="put an adapter into so many blocks of a 70B model; 1.9 GB of disk each"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave the memory of 0.5 B and 3 B out")
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        if args.rules:
            rules(folder, args.repeats, args.mergekit, args.rules)
        if args.commands:
            compare(folder, args.repeats, args.mergekit)
        if args.blocks:
            adapter_into(folder, args.blocks)
        if not args.mergekit:
            print(
                "mergekit is not installed: not compared. pip install mergekit in an environment of its own, then --mergekit"
            )
        for size in () if args.no_memory else SIZES:
            if shutil.disk_usage(folder).free > 25e9:
                memory(folder, size, args.rules)
            else:
                print(f"{size}: NOT RUN, {shutil.disk_usage(folder).free / 1e9:.0f} GB are free and 25 are needed")


if __name__ == "__main__":
    main()
