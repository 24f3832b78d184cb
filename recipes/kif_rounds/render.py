"""The tables of README.md, written from the result files.

python recipes/kif_rounds/render.py                       # from results/*.json
python recipes/kif_rounds/render.py --from OUT/results    # copies the files of finished runs here first
python recipes/kif_rounds/render.py --check               # fails if README.md and results/*.json differ
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "proof")]

from arms import RATES, claim_arms, rate_arms, strength_arms  # noqa: E402
from figures import unpacked  # noqa: E402
from result_tables import Results, read_results, rendered, shown, table  # noqa: E402
from verdicts import verdict  # noqa: E402

README, RESULTS = HERE / "README.md", HERE / "results"
# Heading -> figure, factor, digits.
COLUMNS = {
    "OP": ("op", 100, 1), "BWT": ("bwt", 100, 1), "learned": ("learned", 100, 1), "old loss": ("old_loss", 1, 3),
    "new loss": ("new_loss", 1, 3), "general loss": ("general_loss", 1, 2), "CPU seconds": ("cpu_seconds", 1, 0),
}  # fmt: skip
Claim = tuple[str, str, str, Sequence[str]]

TUNED = "tuned"  # stands for the tuned arm, or for the default arm if tuning chose that
KEEPING = ("op", "bwt", "old_loss")
CLAIMS: dict[str, list[Claim]] = {
    "Controls": [
        ("Mixing the memory in keeps old tasks", "mixed", "sequential", KEEPING),
        ("KIF keeps old tasks", "kif", "sequential", KEEPING),
        ("Joint training is the upper bound", "joint", "sequential", ("op", "old_loss")),
    ],
    "KIF against the same memory mixed in": [
        ("KIF is better", "kif", "mixed", KEEPING),
        ("The code's rule is better", "kif_code", "mixed", KEEPING),
        ("KIF is better at 24 rounds", "kif_24", "mixed_24", KEEPING),
        ("Tuned KIF is better than tuned mixing", TUNED, TUNED, KEEPING),
        ("Alternating without fusion is better", "kif_no_identification", "mixed", KEEPING),
    ],
    "The paper's ablations: KIF is better than": [
        ("no identification", "kif", "kif_no_identification", KEEPING),
        ("a weighted sum", "kif", "kif_weighted", KEEPING),
        ("adaptive weights", "kif", "kif_adaptive", KEEPING),
        ("no shared region", "kif", "kif_no_shared", KEEPING),
        ("static importance", "kif", "kif_static", KEEPING),
    ],
    "RECALL": [
        ("RECALL is better than the uniform average", "recall", "average", ("op", "old_loss")),
        ("RECALL is better than task arithmetic", "recall", "task_arithmetic", ("op", "old_loss")),
        ("RECALL is better than TIES", "recall", "ties", ("op", "old_loss")),
        ("The uniform average keeps old tasks", "average", "sequential", ("op", "old_loss")),
    ],
}


def arms_table(results: Results, order: Iterable[str]) -> str:
    """One line per arm, in the order of the arms' table; the base model first where it was scored."""
    lines = []
    bases = [r["figures"]["base"] for r in results if r["figures"]["base"]]
    if bases:
        cells = {
            "OP": shown([b["score"] for b in bases], 100, 1),
            "general loss": shown([b["general"] for b in bases], 1, 2),
        }
        lines.append(["base model", "", *(cells.get(name, "-") for name in COLUMNS)])
    for arm in sorted({r["arm"] for r in results}, key=list(order).index):
        own = [r for r in results if r["arm"] == arm]
        cells = [shown([{**r, **r["figures"]}.get(key) for r in own], *how) for key, *how in COLUMNS.values()]
        lines.append([f"`{arm}`", ", ".join(str(r["seed"]) for r in own), *cells])
    return table(["arm", "seeds", *COLUMNS], lines)


def claim_lines(claim: Claim, results: Results) -> list[list[str]]:
    """A claim's line for each measure."""
    says, arm, against, measures = claim
    if arm == TUNED:
        there = {r["arm"] for r in results}
        arm, against = (f"{name}_tuned" if f"{name}_tuned" in there else name for name in ("kif", "mixed"))
    lines = []
    for measure in measures:
        found = verdict({"arm": arm, "against": against, "measure": measure}, results)
        factor, digits = (1, 3) if measure.endswith("loss") else (100, 1)
        numbers = ["-", "-", "-"]
        if "difference" in found:
            low, high = (f"{factor * bound:+.{digits}f}" for bound in found["interval"])
            seeds = ", ".join(f"{factor * d:+.{digits}f}" for d in found["by_seed"])
            numbers = [f"{factor * found['difference']:+.{digits}f}", f"{low} to {high}", seeds]
        name = measure.replace("_", " ").replace("op", "OP").replace("bwt", "BWT")
        lines.append([says, f"`{arm}`, `{against}`: {name}", *numbers, f"**{found['verdict']}**"])
    return lines


def tables(results: Results) -> str:
    """Everything between the markers of README.md."""
    text = []
    claim = [{**r, "rows": unpacked(r["rows"])} for r in results if r["use"] == "claim"]
    tuning = [r for r in results if r["use"] == "tuning"]
    if claim:
        minutes = sum(r["cpu_seconds"] for r in claim) / 60
        text += [f"{len(claim)} runs, {minutes:.0f} CPU minutes with scoring. Mean (lowest to highest) over seeds; scores in points, losses in nats "
                 "per token.", "", arms_table(claim, claim_arms(RATES[0], -1, -1)), ""]  # fmt: skip
        head = ["claim", "arms and measure", "difference in its favour", "95 % interval", "by seed", "verdict"]
        for title, claims in CLAIMS.items():
            lines = [line for c in claims for line in claim_lines(c, claim)]
            text += [f"**{title}**", "", table(head, lines), ""]
    if tuning:
        text += ["### Tuning, seeds 20 and 21", "", arms_table(tuning, [*rate_arms(), *strength_arms(RATES[0])]), ""]
    return "\n".join(text) if text else "Not run yet.\n"


def check_readme(readme: Path = README, results: Path = RESULTS) -> str | None:
    """A sentence if the tables of a README are not those of the result files, else None."""
    text = readme.read_text(encoding="utf-8")
    if text == rendered(text, tables(read_results(results))):
        return None
    return f"{readme.name} and {results.name}/*.json differ: write the tables again with python recipes/kif_rounds/render.py."


def main() -> int:
    """Write or check the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; the exit code is 1 if they differ")
    parser.add_argument("--from", dest="source", type=Path, help="copy the result files of this folder first")
    args = parser.parse_args()
    if args.check:
        problem = check_readme()
        print(problem or "README.md has the tables of its result files.")
        return 1 if problem else 0
    for file in [] if args.source is None else args.source.glob("[ct]*.json"):  # not those of the smoke test
        shutil.copy2(file, RESULTS / file.name)
    README.write_text(rendered(README.read_text(encoding="utf-8"), tables(read_results(RESULTS))), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
