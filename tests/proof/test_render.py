"""The README's tables are those of the result files, and nothing is shown that was not measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.proof.made_up import result, seeds

PROOF = Path(__file__).parents[2] / "recipes" / "proof"


@pytest.fixture
def render(monkeypatch):
    monkeypatch.syspath_prepend(str(PROOF))
    from recipes.proof import render

    yield render
    sys.modules.pop("verdicts", None)


def test_the_readme_has_the_tables_of_its_files(render):
    assert render.check_readme() is None


def test_without_results_the_readme_says_so(render):
    assert render.tables([]) == "Not run yet.\n"


def test_tables(render, tmp_path):
    found = [*seeds("sequential", old=(2.0, 2.5, 3.0)), *seeds("replay_10", old=1.0, learned=0.5), result("kif", 0)]
    text = render.tables(found)
    lines = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| `")}
    assert "2.50 (2.00 to 3.00)" in lines["| `sequential`"] and "| 0, 1, 2 |" in lines["| `sequential`"]
    assert "| 0 |" in lines["| `kif`"]  # one seed
    claim = next(line for line in text.splitlines() if line.startswith("| Replay of 10 %"))
    assert "+1.500 | +1.000 to +2.000 | +1.000, +1.500, +2.000 | **holds, learns less** |" in claim
    assert "**not measured**" in next(line for line in text.splitlines() if "More rounds" in line)
    assert "Goal: not measured" in text


def test_a_changed_file_is_found(render, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    readme = tmp_path / "README.md"
    readme.write_text((PROOF / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    made = seeds("sequential")
    for r in made:
        (results / f"{r['arm']}-seed{r['seed']}.json").write_text(json.dumps(r))
    assert "differ: write the tables again" in (render.check_readme(readme, results) or "")
    readme.write_text(
        render.rendered(readme.read_text(encoding="utf-8"), render.tables(render.read_results(results))),
        encoding="utf-8",
    )
    assert render.check_readme(readme, results) is None
    made[0]["figures"]["op"] = 0.9
    (results / "sequential-seed0.json").write_text(json.dumps(made[0]))
    assert render.check_readme(readme, results) is not None


def test_failed_runs_are_listed(render):
    failed = {**result("ewc", 1), "error": "ValueError: the loss is not a number"}
    text = render.tables([*seeds("sequential"), failed])
    assert "* `claim-longseq/ewc-seed1`: ValueError" in text


def test_the_frontier_is_drawn(render, tmp_path):
    (tmp_path / "results").mkdir()
    render.draw([*seeds("sequential"), *seeds("replay_10", old=1.0)], tmp_path)
    assert (tmp_path / "results" / "cpu-longseq.png").stat().st_size > 5000
