"""KIF at the paper's number of rounds, its ablations, and RECALL, in a world of invented words: seconds a run on one core.

    python recipes/kif_rounds/run.py tuning --out OUT         # seeds 20 and 21
    python recipes/kif_rounds/run.py claim --out OUT          # seeds 0, 1 and 2
    python recipes/kif_rounds/run.py smoke --out OUT          # one short run of three arms: no result
    python recipes/kif_rounds/render.py --from OUT/results    # keeps the result files, and writes the README's tables

One result file per run. If killed, the same command resumes after the last finished task; two of them share the work.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import shutil
from pathlib import Path

from arms import ARMS, CLAIM, ROUNDS, TUNING, plan
from filelock import FileLock, Timeout
from result_file import measure
from world import SIZES, make

from hf_continual import train_stream
from hf_continual.atomic_files import write_text

SEEDS = {"tuning": [20, 21], "claim": [0, 1, 2], "smoke": [0]}
SMALL = {"words": 48, "channels": 16, "layers": 1, "pretraining": 2, "batch": 4, "train": 100, "test": 4, "general": 4}
USES = {"tuning": list(TUNING), "claim": list(CLAIM), "smoke": ["mixed", "kif", "recall"]}


def run_one(use: str, arm: str, seed: int, out: Path) -> None:
    """Train, score and measure a run, and write its result file; its folder is removed then."""
    small = use == "smoke"
    model = make(seed, out / f"world{seed}", SMALL if small else SIZES)
    run, before = out / use / f"{arm}-seed{seed}", resource.getrusage(resource.RUSAGE_SELF)
    train_stream(plan(arm, seed, model, run, 1 if small else ROUNDS))
    after = resource.getrusage(resource.RUSAGE_SELF)
    found = measure(run, {"use": use, "arm": arm, "seed": seed})
    found["cpu_seconds"] = round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)
    write_text(out / "results" / f"{use}-{arm}-seed{seed}.json", json.dumps(found, separators=(",", ":")) + "\n")
    print(use, arm, seed, found["figures"], f"{found['cpu_seconds']:.0f} CPU seconds", flush=True)
    shutil.rmtree(run)


def main() -> None:
    """Take the runs that have no result file and that no other process holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("use", choices=list(USES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these")
    args = parser.parse_args()
    (args.out / "results").mkdir(parents=True, exist_ok=True)
    gc.freeze()  # the imported modules: else each of a run's many collections walks through all of them, half of its time
    for arm in args.arms or USES[args.use]:
        for seed in args.seeds or SEEDS[args.use]:
            name = f"{args.use}-{arm}-seed{seed}"
            if (args.out / "results" / f"{name}.json").is_file():
                continue
            try:
                with FileLock(args.out / f"{name}.lock", timeout=0):
                    if not (args.out / "results" / f"{name}.json").is_file():
                        run_one(args.use, arm, seed, args.out)
            except Timeout:
                continue


if __name__ == "__main__":
    main()
