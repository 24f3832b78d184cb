"""KIF at the paper's number of rounds, its ablations, and RECALL, in a world of invented words: seconds a run on one core.

    python recipes/kif_rounds/run.py --out OUT                # tuning on seeds 20 and 21, the claim on 0, 1 and 2
    python recipes/kif_rounds/run.py --smoke --out OUT        # three short runs, not results
    python recipes/kif_rounds/render.py --from OUT/results    # keeps the result files, and writes the README's tables

One result file per run. If killed, the same command resumes after the last finished task; two of them share the work.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from arms import MEMORY_ROWS, RATES, ROUNDS, SHARES, Arm, claim_arms, plan, rate_arms, strength_arms
from filelock import FileLock, Timeout
from result_file import measure
from world import SIZES, make

from hf_continual import train_stream
from hf_continual.atomic_files import write_text

TUNING, CLAIM = (20, 21), (0, 1, 2)
SMALL = {"words": 48, "channels": 16, "layers": 1, "pretraining": 2, "batch": 4, "train": 100, "test": 4, "general": 4}
Run = tuple[str, str, Arm, int]  # use, name of the arm, arm, seed


def file_of(out: Path, use: str, name: str, seed: int) -> Path:
    """The result file of a run."""
    return out / "results" / f"{use}-{name}-seed{seed}.json"


def best(out: Path, names: Iterable[str], figure: str) -> int | None:
    """The number of the tried arm with the greatest mean of a figure over the tuning seeds; None until all have run."""
    files = [[file_of(out, "tuning", name, seed) for seed in TUNING] for name in names]
    if not all(file.is_file() for own in files for file in own):
        return None
    means = [
        statistics.fmean(json.loads(f.read_text(encoding="utf-8"))["figures"][figure] for f in own) for own in files
    ]
    return means.index(max(means))


def stages(out: Path) -> Iterator[list[Run]]:
    """The runs in three stages; the choices of a stage need the results of the one before."""
    arms = rate_arms()
    yield [("tuning", name, arm, seed) for name, arm in arms.items() for seed in TUNING]
    found = best(out, arms, "learned")
    if found is None:
        return
    rate = RATES[found]
    arms = strength_arms(rate)
    yield [("tuning", name, arm, seed) for name, arm in arms.items() for seed in TUNING]
    rows, share = (best(out, [name for name in arms if name.startswith(kind)], "op") for kind in ("mixed", "kif"))
    if rows is None or share is None:
        return
    arms = claim_arms(rate, MEMORY_ROWS[rows], SHARES[share])
    yield [("claim", name, arm, seed) for name, arm in arms.items() for seed in CLAIM]


def run_one(run: Run, out: Path) -> None:
    """Train, score and measure a run, and write its result file; its folder is removed then."""
    use, name, arm, seed = run
    small = use == "smoke"
    model = make(seed, out / f"world{seed}", SMALL if small else SIZES)
    folder, before = out / use / f"{name}-seed{seed}", resource.getrusage(resource.RUSAGE_SELF)
    train_stream(plan(arm, seed, model, folder, 1 if small else ROUNDS, base=name == "sequential"))
    after = resource.getrusage(resource.RUSAGE_SELF)
    found = measure(folder, {"use": use, "arm": name, "seed": seed, "options": arm})
    found["cpu_seconds"] = round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)
    write_text(file_of(out, use, name, seed), json.dumps(found, separators=(",", ":")) + "\n")
    shown = {k: round(v, 3) for k, v in found["figures"].items() if isinstance(v, float)}
    print(use, name, seed, shown, f"{found['cpu_seconds']:.0f} CPU seconds", flush=True)
    shutil.rmtree(folder)


def work(runs: list[Run], out: Path) -> None:
    """Take the runs without a result file; wait for those that another process holds."""
    while open_runs := [run for run in runs if not file_of(out, run[0], run[1], run[3]).is_file()]:
        for run in open_runs:
            try:
                with FileLock(out / f"{run[0]}-{run[1]}-seed{run[3]}.lock", timeout=0):
                    if not file_of(out, run[0], run[1], run[3]).is_file():
                        run_one(run, out)
            except Timeout:
                time.sleep(1)


def main() -> None:
    """Tune, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="three short runs, which are not results")
    args = parser.parse_args()
    (args.out / "results").mkdir(parents=True, exist_ok=True)
    gc.freeze()  # the imported modules: else each of a run's many collections walks through all of them, half of its time
    if args.smoke:
        arms = claim_arms(RATES[0], MEMORY_ROWS[1], SHARES[0])
        work([("smoke", name, arms[name], 0) for name in ("mixed", "kif", "recall")], args.out)
        return
    for runs in stages(args.out):
        work(runs, args.out)


if __name__ == "__main__":
    main()
