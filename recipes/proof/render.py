"""The tables of README.md, written from the result files; and a frontier of learning and keeping.

python recipes/proof/render.py                        # writes the tables from results/*.json
python recipes/proof/render.py --from OUT/results     # copies the files of a finished run here first
python recipes/proof/render.py --check                # fails if README.md and results/*.json differ
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from pathlib import Path

import yaml
from result_tables import Results, read_results, rendered, shown, table
from verdicts import by_seed, choose, goal, verdict

HERE = Path(__file__).parent
README, RESULTS, PICTURES = HERE / "README.md", HERE / "results", ("png",)
# Heading -> figure or cost, factor, digits.
COLUMNS = {
    "OP": ("op", 100, 1), "BWT": ("bwt", 100, 1), "forgetting": ("forgetting", 100, 1), "FWT": ("fwt", 100, 1),
    "learned": ("learned", 100, 1), "old loss": ("old_loss", 1, 2), "general loss": ("general_loss", 1, 3), "KL to base": ("kl", 1, 3),
    "tokens": ("tokens", 1e-3, 1), "seconds": ("seconds", 1, 0), "CPU seconds": ("cpu_seconds", 1, 0), "model, MB": ("model_bytes", 1e-6, 2),
    "state, MB": ("state_bytes", 1e-6, 2),
}  # fmt: skip


def arms_table(results: Results) -> str:
    """One line per arm of a data set, the base model first."""
    first = next(r for r in results if "error" not in r)
    op = statistics.fmean(first["base"])
    loss = statistics.fmean(first["nll_base"][:-1])
    base = {
        "OP": f"{100 * op:.1f}",
        "old loss": f"{loss:.2f}",
        "general loss": f"{first['figures']['general_base']:.3f}",
    }
    lines = [["base model", "", *(base.get(name, "-") for name in COLUMNS)]]
    for arm in dict.fromkeys(r["arm"] for r in results):
        own = list(by_seed(results, arm).values())
        cells = [
            shown([{**r, **r["figures"], **r["cost"]}.get(key) for r in own], *how) for key, *how in COLUMNS.values()
        ]
        lines.append([f"`{arm}`", ", ".join(str(r["seed"]) for r in own), *cells])
    return table(["arm", "seeds", *COLUMNS], lines)


def claims_table(results: Results) -> str:
    """One line per claim of claims.yaml."""
    lines = []
    for claim in yaml.safe_load((HERE / "claims.yaml").read_text(encoding="utf-8")):
        found = verdict(claim, results)
        factor, digits = (1, 3) if claim["measure"].endswith("loss") else (100, 1)
        numbers = ["-", "-", "-"]
        if "difference" in found:
            low, high = (f"{factor * bound:+.{digits}f}" for bound in found["interval"])
            seeds = ", ".join(f"{factor * d:+.{digits}f}" for d in found["by_seed"])
            numbers = [f"{factor * found['difference']:+.{digits}f}", f"{low} to {high}", seeds]
        compared = f"`{claim['arm']}`, `{claim['against']}`: {claim['measure'].replace('_', ' ')}"
        lines.append([claim["says"], compared, *numbers, f"**{found['verdict']}**"])
    return table(
        ["claim", "arms and measure", "difference in its favour", "95 % interval", "by seed", "verdict"], lines
    )


def goal_text(results: Results, tuning: Results) -> str:
    """Whether the composition reaches the goal."""
    candidates = list(dict.fromkeys(r["arm"] for r in tuning if r["arm"].startswith("comp_")))
    arm = choose(tuning, candidates) if candidates else None
    if arm is None:
        return "Goal: not measured (tuning has not chosen a composition)."
    found = goal(results, arm)
    said = {True: "reached", False: "missed", None: "not measured, or not decided by this data set"}[found["reached"]]
    if "old" not in found:
        return f"Goal, `{arm}`: {said}."
    ratio = "-" if found["tokens"] is None else f"{found['tokens']:.2f}"
    return (
        f"Goal, `{arm}` against `{found['plain']}`: **{said}**. Kept {100 * found['old']:.0f} % of the old loss and "
        f"{100 * found['general']:.0f} % of the general loss; learned {100 * found['learned']:+.1f} points; {ratio} times the tokens."
    )


def tables(results: Results) -> str:
    """Everything between the markers of README.md."""
    if not results:
        return "Not run yet.\n"
    text = []
    for preset in dict.fromkeys(r["preset"] for r in results):
        own = [r for r in results if r["preset"] == preset]
        tuning = [r for r in own if r["use"] == "tuning"]
        for data in dict.fromkeys(r["data"] for r in own if r["use"] == "claim"):
            claim = [r for r in own if r["use"] == "claim" and r["data"] == data]
            if all("error" in r for r in claim):
                continue
            text += [f"### {data}, preset {preset}", ""]
            hardware = sorted({str(r["cost"]["hardware"]) for r in claim if "error" not in r})
            hours = sum(r["cpu_seconds"] for r in claim) / 3600
            text += [f"{len(claim)} runs, {hours:.1f} CPU hours with scoring, on {'; '.join(hardware)}. Mean (lowest to highest) over seeds; "
                     "scores in points, losses and KL in nats per token, tokens in thousands.", "", arms_table(claim), ""]  # fmt: skip
            text += (
                [f"![Learning and keeping]({picture(preset, data)})", ""]
                if (RESULTS / Path(picture(preset, data)).name).is_file()
                else []
            )
            text += [goal_text(claim, tuning), "", claims_table(claim), ""]
        if tuning:
            text += [f"### Tuning, preset {preset}", "", arms_table(tuning), ""]
        if failed := [r for r in own if "error" in r]:
            text += ["Runs that ended with an error:", "", *(f"* `{r['run']}`: {r['error']}" for r in failed), ""]
    return "\n".join(text)


def picture(preset: str, data: str) -> str:
    """The frontier's file, as README.md names it."""
    return f"results/{preset}-{data}.png"


def draw(results: Results, out: Path) -> None:
    """Draw the frontier of each data set: what was learned against what was kept.

    Args:
        results: Result files.
        out: Folder that gets ``results/PRESET-DATA.png``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    whole = [r for r in results if "error" not in r and r["use"] == "claim"]
    for preset, data in dict.fromkeys((r["preset"], r["data"]) for r in whole):
        own = [r for r in whole if (r["preset"], r["data"]) == (preset, data)]
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        for axis, key in zip(figure.subplots(1, 2), ("old_loss", "general_loss"), strict=True):
            for arm in dict.fromkeys(r["arm"] for r in own):
                runs = [
                    r["figures"]
                    for r in own
                    if r["arm"] == arm and None not in (r["figures"]["learned"], r["figures"][key])
                ]
                if runs:
                    x, y = (statistics.fmean(f[k] for f in runs) for k in ("learned", key))
                    axis.plot(100 * x, y, "o", color="#0072B2", markersize=5)
                    axis.annotate(arm, (100 * x, y), xytext=(4, 2), textcoords="offset points", fontsize=7)
            axis.set_xlabel("learned (points): mean score of each task right after it")
            axis.set_ylabel(f"{key.replace('_', ' ')} (nats per token), lower is better")
            axis.grid(alpha=0.25)
        figure.savefig(out / picture(preset, data), dpi=110)


def check_readme(readme: Path = README, results: Path = RESULTS) -> str | None:
    """A sentence if the tables of a README are not those of the result files, else None."""
    text = readme.read_text(encoding="utf-8")
    if text == rendered(text, tables(read_results(results))):
        return None
    return (
        f"{readme.name} and {results.name}/*.json differ: write the tables again with python recipes/proof/render.py."
    )


def main() -> int:
    """Write or check the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; the exit code is 1 if they differ")
    parser.add_argument(
        "--from", dest="source", type=Path, help="copy the result files and pictures of this folder first"
    )
    args = parser.parse_args()
    if args.check:
        problem = check_readme()
        print(problem or "README.md has the tables of its result files.")
        return 1 if problem else 0
    if args.source is not None:
        if any(r["preset"] == "smoke" for r in read_results(args.source)):
            print("these are files of the smoke preset, which are not results: nothing was copied.", file=sys.stderr)
            return 1
        RESULTS.mkdir(exist_ok=True)
        for file in [*args.source.glob("*.json"), *args.source.glob("*.png")]:
            shutil.copy2(file, RESULTS / file.name)
    text = README.read_text(encoding="utf-8")
    README.write_text(rendered(text, tables(read_results(RESULTS))), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
