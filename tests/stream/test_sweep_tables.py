"""Tables of a sweep on a narrow terminal, as CSV and Markdown; comparisons on the same rows."""

from __future__ import annotations

import csv
import io
import json

import pytest
from rich.console import Console

from hf_continual.atomic_files import write_json, write_lines
from hf_continual.metrics import SUMMARY
from hf_continual.stream.compare import compare_arms, compare_runs
from hf_continual.stream.report import matrix_table, p_text, results_report
from hf_continual.stream.scores import keep_score
from hf_continual.stream.stored_run import row_values
from hf_continual.stream.sweep_files import write_sweep

ARMS = [
    "plain fine-tuning, one after the other",
    "replay-ten-percent-of-tokens",
    "kif_with_memory_of_20_rows",
    "freeze-and-gere",
]


def sweep(lower=False, gauges=("general text", "arc_easy")):
    """A sweep of four arms and two seeds, figures by hand."""
    runs, arms = {}, {}
    for i, name in enumerate(ARMS):
        own = []
        for seed in (0, 1):
            figures = {key: 0.125 * i + 0.25 * seed + 0.01 * k for k, key in enumerate(SUMMARY)}
            runs[f"{name}-seed{seed}"] = {
                "arm": name, "order": "", "seed": seed, "status": "MEASURED", "summary": figures,
                "nll": {"summary": {"overall_performance": 1.5}}, "gauge_changes": dict.fromkeys(gauges, 0.5 * i),
            }  # fmt: skip
            own.append(f"{name}-seed{seed}")
        figures = {
            key: {"mean": 0.125 * i + 0.125 + 0.01 * k, "sd": 0.1768, "interval": (0.05 * i, 0.3 + 0.15 * i)}
            for k, key in enumerate(SUMMARY)
        }
        arms[name] = {"runs": own, "figures": figures, "nll": 1.5, "gauge_changes": dict.fromkeys(gauges, 0.5 * i)}
    runs[f"{ARMS[0]}-seed2"] = {"arm": ARMS[0], "order": "", "seed": 2, "status": "NOT_RUN"}
    compared = [
        {"first": ARMS[0], "second": n, "seeds": [0, 1], "difference": 0.125 * i, "interval": (-0.02, 0.31), "p_value": 0.0004,
         "n": 64, "better": 9, "worse": 1, "test": "McNemar, exact"} for i, n in enumerate(ARMS) if i
    ]  # fmt: skip
    return {"format": 1, "lower_is_better": lower, "runs": runs, "arms": arms, "comparisons": compared}


def printed(report, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(report)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_sweep_can_be_read_on_a_narrow_terminal(width):
    """No name and no number is cut off, whatever the width; every block names its arms."""
    text = printed(results_report(sweep()), width)
    assert "…" not in text and "..." not in text and max(map(len, text.splitlines())) <= width
    together = "".join(text.split())
    for value in ("12.5±17.7", "50.0±17.7", "+12.5", "-2.0to+31.0", "<0.001", "9/1", "+1.500", "OP:", "forgot:"):
        assert value in together, value
    blocks = text.count(" arm ")
    assert blocks >= 2 and "NOT_RUN" in text
    for name in ARMS:
        assert text.count(name[:16]) >= 3, "each block names its arms"


def test_losses_are_not_per_cent():
    text = printed(results_report(sweep(lower=True)), 100)
    assert "0.125±0.177" in text and "12.5" not in text and "losses" in text


def test_a_matrix_of_many_tasks_fits():
    names = [f"task_number_{i}" for i in range(15)]
    scores = [[1.0 if j <= i else None for j in range(15)] for i in range(15)]
    text = printed(
        matrix_table(
            {
                "matrix": {"scores": scores, "base": [0.0] * 15, "lower_is_better": False},
                "metric": "exact",
                "tasks": names,
            }
        )
    )
    assert "…" not in text and max(map(len, text.splitlines())) <= 80 and text.count("(base model)") >= 3
    assert text.count("100.0") == 120 and "exact, in %" in text


def test_files_of_a_sweep(tmp_path):
    found = sweep()
    write_sweep(tmp_path, found)
    runs = list(csv.DictReader((tmp_path / "runs.csv").read_text(encoding="utf-8").splitlines()))
    assert len(runs) == 9 and runs[3]["run"] == f"{ARMS[1]}-seed1" and float(runs[3]["overall_performance"]) == 0.375
    assert runs[-1]["status"] == "NOT_RUN" and runs[-1]["overall_performance"] == "" and runs[3]["answer_nll"] == "1.5"
    arms = list(csv.DictReader((tmp_path / "arms.csv").read_text(encoding="utf-8").splitlines()))
    assert [a["arm"] for a in arms] == ARMS and float(arms[2]["overall_performance"]) == 0.375
    assert (float(arms[2]["overall_performance_low"]), float(arms[2]["overall_performance_high"])) == (0.1, 0.6)
    assert float(arms[3]["change_arc_easy"]) == 1.5 and arms[0]["forgetting_sd"] == "0.1768"
    text = (tmp_path / "sweep.md").read_text(encoding="utf-8")
    assert (
        f"| {ARMS[1]} | 2 | 25.0±17.7 |" in text
        and f"| {ARMS[1]} | +12.5 | -2.0 to +31.0 | < 0.001 | 9/1 | 64 |" in text
    )
    assert "![What each arm knows at the end, and what it forgot](sweep.png)" in text
    assert (tmp_path / "sweep.png").stat().st_size > 5000
    assert p_text(0.0215) == "0.021" and p_text(1.0) == "1.000" and p_text(1e-9) == "< 0.001"


def test_arms_are_compared_by_rows():
    """With one seed McNemar: 3 rows better, none worse, p = 2 / 2^3. With two a row's score is its mean over seeds."""
    plain, other = {0: {"a": [0.0, 0.0, 0.0, 1.0]}}, {0: {"a": [1.0, 1.0, 1.0, 1.0]}, 7: {"a": [0.0] * 4}}
    found = compare_arms([("plain", plain), ("other", other), ("none", {3: {"a": [1.0] * 4}})])
    assert (
        len(found) == 1 and found[0]["seeds"] == [0] and found[0]["p_value"] == 0.25 and found[0]["difference"] == 0.75
    )
    two = compare_arms([("plain", plain | {7: {"a": [0.0, 0.0, 1.0, 1.0]}}), ("other", other)])[0]
    # Means over the seeds: 0, 0, .5, 1 and .5, .5, .5, .5; the differences .5, .5, 0, -.5.
    assert two["difference"] == pytest.approx(0.125) and (two["better"], two["worse"]) == (2, 1)
    loss = compare_arms([("plain", {0: {"a": [2.0, 3.0]}}), ("other", {0: {"a": [1.0, 2.5]}})], lower_is_better=True)[0]
    assert loss["difference"] == pytest.approx(0.75) and loss["better"] == 2, "a smaller loss is better"


def test_rows_that_count_differently_have_the_mean_of_their_cell():
    """Scores 1 and 3 with weights 1 and 3: their mean is 2.5; around it 2.5 - 0.5 * 1.5 and 2.5 + 1.5 * 0.5."""
    lines = [{"score": 1.0, "weight": 1.0}, {"score": 3.0, "weight": 3.0}]
    assert row_values(lines) == [1.75, 3.25] and row_values([{"score": 0.5}, {"score": 1.0}]) == [0.5, 1.0]


class Task:
    """A task as far as scores need one."""

    def __init__(self, name, rows):
        self.name, self.test = name, rows


def run_folder(folder, scores, rows, protocol="exact match"):
    """The folder of a finished run of one task."""
    from hf_continual.evaluation.result import RowScore, Scored

    folder.mkdir()
    stage = folder / "task-00-a"
    (stage / "continual").mkdir(parents=True)
    scored = Scored([RowScore(s, reference=r["completion"]) for s, r in zip(scores, rows, strict=True)], protocol)
    keep_score(stage, "task-00-a", folder, Task("a", rows), scored)
    write_json(folder / "continual_results.json", {"tasks": ["a"]})
    return folder


def test_runs_are_compared_on_the_same_rows_only(tmp_path):
    rows = [{"prompt": f"q {i}", "completion": "x"} for i in range(16)]
    one = run_folder(tmp_path / "one", [1.0] * 6 + [0.0] * 10, rows)
    two = run_folder(tmp_path / "two", [1.0] * 16, rows)
    found = compare_runs(one, two)
    assert found["overall"] == found["a"] and found["a"].difference == 0.625
    assert found["a"].p_value == pytest.approx(2 / 2**10) and found["a"].interval[0] > 0.3
    stored = json.loads((two / "task-00-a" / "continual" / "scores.json").read_text())["a"]
    assert stored["interval"] == [pytest.approx(0.8064, abs=5e-5), 1.0] and stored["value"] == 1.0
    other = run_folder(tmp_path / "other", [1.0] * 16, [*rows[:15], {"prompt": "q", "completion": "x"}])
    with pytest.raises(ValueError, match=r"scored on other rows .*\(row 16 differs\)"):
        compare_runs(one, other)
    shorter = run_folder(tmp_path / "shorter", [1.0] * 15, rows[:15])
    with pytest.raises(ValueError, match=r"\(16 and 15 rows\)"):
        compare_runs(one, shorter)
    metric = run_folder(tmp_path / "metric", [1.0] * 16, rows, "rougeL, greedy")
    with pytest.raises(ValueError, match="scored in other ways: 'exact match' in .*'rougeL, greedy'"):
        compare_runs(one, metric)
    with pytest.raises(FileNotFoundError, match="it is not the folder of a run"):
        compare_runs(one, tmp_path)
    write_json(tmp_path / "continual_results.json", {"arms": {}})
    with pytest.raises(ValueError, match="Name the folder of one run, not that of a sweep"):
        compare_runs(one, tmp_path)
    write_lines(two / "predictions" / "task-00-a.a.jsonl", [])
    with pytest.raises(ValueError, match="no scored task in common"):
        compare_runs(one, two)
