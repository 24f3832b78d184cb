"""Every changed number of a card, its results and its metadata is found; so are its author's claims."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from hf_continual import render_card
from hf_continual.atomic_files import write_json, write_lines
from hf_continual.hub.facts import CardFacts, Evaluation, GaugeFacts, MethodFacts, TaskFacts
from hf_continual.hub.files import write_card
from hf_continual.hub.folder_facts import evaluation_from, read_facts
from hf_continual.hub.lint import lint_folder
from hf_continual.hub.refs import ModelRef
from hf_continual.intervals import figure_intervals
from hf_continual.metrics import matrix_of

TASKS = ("law", "tax")
# Rows by (after, task), right or wrong: 3 of 4 law after law, 1 of 4 after tax, 4 of 5 tax; the base 0 and 1.
ROWS = {
    (-1, 0): [0, 0, 0, 0], (-1, 1): [0, 1, 0, 0, 0], (0, 0): [1, 1, 1, 0], (0, 1): [0, 1, 1, 0, 0], (1, 0): [1, 0, 0, 0],
    (1, 1): [1, 1, 1, 1, 0],
}  # fmt: skip
SHORT = {"op": "overall_performance", "bwt": "backward_transfer", "fwt": "forward_transfer", "forgetting": "forgetting"}


def a_run(folder):
    """The folder of a run's last task, with everything that it was computed from next to it."""
    folders = {-1: folder / "base", 0: folder / "task-00-law", 1: folder / "task-01-tax"}
    for after, place in folders.items():
        cells = {}
        for j, task in enumerate(TASKS):
            scores = [float(v) for v in ROWS[after, j]]
            cells[task] = {"value": sum(scores) / len(scores), "n": len(scores), "status": "MEASURED"}
            write_lines(folder / "predictions" / f"{place.name}.{task}.jsonl", [{"score": s} for s in scores])
        texts = [{"score": 3.0 + after / 2, "weight": 10}, {"score": 3.5 + after / 2, "weight": 30}]
        cells["general text"] = {"value": 3.375 + after / 2, "n": 40, "status": "MEASURED"}
        write_lines(folder / "predictions" / f"{place.name}.general-text.jsonl", texts)
        write_json(place / "continual" / "scores.json", cells)
    rows = {place: [float(v) for v in scores] for place, scores in ROWS.items()}
    matrix = matrix_of({place: sum(v) / len(v) for place, v in rows.items()}, 2)
    found = figure_intervals([rows], 2)
    evaluation = Evaluation(
        TASKS, tuple(map(tuple, matrix.scores)), tuple(matrix.base), "exact match", rows={"law": 4, "tax": 5},
        gauges=(GaugeFacts("general text", 2.875, 3.875, True, "NLL per token of general text", 40),),
        intervals={name: found[long] for name, long in SHORT.items()},
    )  # fmt: skip
    facts = CardFacts(
        "two", repo_id="me/two", base=ModelRef("org/base", "a" * 40, "mit"), tasks=(TaskFacts("law", train_rows=700), TaskFacts("tax")),
        methods=(MethodFacts("recadam", {"pull": 0.01}),), evaluation=evaluation, seed=1, steps=30, settings={"learning_rate": 2e-4},
        versions={"trl": "1.16.0"},
    )  # fmt: skip
    write_card(folders[1], facts)
    return folders[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return a_run(tmp_path_factory.mktemp("run"))


def other(number):
    """Another number of the same length: its first digit changed, so that no rounding hides it."""
    return str((int(number[0]) + 1) % 10 or 1) + number[1:] if number[0] != "9" else "8" + number[1:]


def test_every_number_of_a_card_changed_in_turn_is_found(finished):
    """Titles, metadata, tables, sentences, versions, citations: every number outside of the author's text."""
    assert not lint_folder(finished)
    file = finished / "README.md"
    text = file.read_text(encoding="utf-8")
    places = list(re.finditer(r"\d+(?:\.\d+)?", text))
    assert len(places) >= 60
    try:
        for place in places:
            file.write_text(text[: place.start()] + other(place[0]) + text[place.end() :], encoding="utf-8")
            line = text[: place.start()].count("\n")
            assert lint_folder(finished), f"{place[0]} of {text.splitlines()[line]!r} can be changed"
    finally:
        file.write_text(text, encoding="utf-8")


def leaves(data, path=()):
    """Path and value of every number of plain data."""
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from leaves(value, (*path, key))
    elif isinstance(data, int | float) and not isinstance(data, bool):
        yield path, data


def test_every_number_of_the_results_changed_in_turn_is_found_although_the_card_agrees(finished):
    """Results are computed again from scores and predictions: edits followed by rendering the card are found as well."""
    file, card = finished / "continual_results.json", finished / "README.md"
    whole, text = file.read_text(encoding="utf-8"), card.read_text(encoding="utf-8")
    data = json.loads(whole)
    tried = [(path, value) for path, value in leaves(data) if path != ("format",)]
    assert len(tried) > 20
    try:
        for path, value in tried:
            changed = json.loads(whole)
            at = changed
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = value + (1 if isinstance(value, int) else 0.125)
            figures = evaluation_from(changed).figures
            if path[0] not in figures:
                changed |= figures
            file.write_text(json.dumps(changed), encoding="utf-8")
            card.write_text(render_card(read_facts(finished), text), encoding="utf-8")
            assert lint_folder(finished), path
    finally:
        file.write_text(whole, encoding="utf-8")
        card.write_text(text, encoding="utf-8")
    assert not lint_folder(finished)


def test_what_is_said_names_both_files(tmp_path):
    folder = a_run(tmp_path)
    facts = read_facts(folder)
    matrix = ((0.75, 0.4), (0.25, 0.8))
    assert facts.evaluation.matrix == matrix
    for changed, said in (
        (
            {"matrix": ((0.5, 0.4), (0.25, 0.8))},
            "says 0.5 for 'law' after law, but ../task-00-law/continual/scores.json says 0.75.",
        ),
        ({"base_row": (0.0, 0.6)}, "says 0.6 for 'tax' of base, but ../base/continual/scores.json says 0.2."),
        ({"rows": {"law": 400, "tax": 5}}, "says 400 rows for 'law', but continual/scores.json says 4."),
        ({"intervals": {"op": (0.5, 0.55)}}, "says that op lies between 0.5000 and 0.5500, and the predictions give"),
    ):
        write_card(folder, replace(facts, evaluation=replace(facts.evaluation, **changed)))
        assert any(said in f.message for f in lint_folder(folder)), [f.message for f in lint_folder(folder)]
    write_card(folder, facts)
    write_lines(tmp_path / "predictions" / "task-00-law.law.jsonl", [{"score": 1.0}] * 4)
    assert any(
        "says 0.75 for 'law' after law, and its 4 predictions give 1.0." in f.message for f in lint_folder(folder)
    )


def test_a_folder_that_was_moved_has_its_own_scores_only(tmp_path):
    folder = a_run(tmp_path / "run")
    folder.rename(tmp_path / "alone")
    assert not lint_folder(tmp_path / "alone")


@pytest.mark.parametrize(
    ("said", "claimed"),
    [
        ("Accuracy 0.75 on law.", None), ("Accuracy 0.75 on tax.", "0.75"), ("It scores 80 % on tax, and 25 % on law.", None),
        ("It scores 25 % on tax, and 80 % on law.", "25 %"), ("| law | 0.7500 | accuracy |", None), ("It forgot 50 % of law.", None),
        ("It reaches 80 % on MMLU.", "80 %"), ("80 % on GSM8K and 80 % on tax.", "80 %"), ("Its loss on general text is 3.88.", None),
        ("Its loss on general text is 0.75.", "0.75"), ("It is right in 80 % of all rows.", None), ("Mean score 0.525.", None),
        ("Accuracy 0.01.", "0.01"), ("A pull of 0.01 scored better.", None), ("With learning rate 0.0002 it forgot less.", None),
    ],
)  # fmt: skip
def test_a_claim_is_compared_with_what_it_is_about(tmp_path, said, claimed):
    """A number that was measured of something else is not evidence."""
    folder = a_run(tmp_path)
    file = folder / "README.md"
    file.write_text(file.read_text().replace("<!-- hf_continual:keep -->\n", f"<!-- hf_continual:keep -->\n{said}\n"))
    found = [f for f in lint_folder(folder) if f.is_claim]
    assert bool(found) == (claimed is not None) and all(f"{claimed!r}" in f.message for f in found[:1]), found


def test_headline_and_limits_speak_of_general_loss(finished):
    """From 2.875 to 3.875 nats: e = 2.72 times the perplexity."""
    card = (finished / "README.md").read_text(encoding="utf-8")
    headline, _, limits = card.partition("## Limits and intended use")
    assert (
        "Outside its tasks it got worse: general text from 2.8750 to 3.8750." in headline.partition("## How to use")[0]
    )
    assert (
        "- Worse than the base model outside its tasks: general text 2.8750 to 3.8750 (+1.0000, 2.72 times its perplexity)."
        in limits
    )
    better = replace(read_facts(finished).evaluation, gauges=(GaugeFacts("general text", 3.0, 2.5, True, "NLL", 40),))
    assert "orse than the base" not in render_card(replace(read_facts(finished), evaluation=better))
    unknown = replace(better, gauges=(GaugeFacts("general text", None, 2.5, True, "NLL", 40),))
    said = "Whether general text changed is unknown: the base model was not measured."
    assert said in render_card(replace(read_facts(finished), evaluation=unknown))


def test_a_run_without_a_name_for_its_task():
    facts = CardFacts("x", base=ModelRef("org/base"), tasks=(TaskFacts("task"),))
    assert "A language model that was fine-tuned from" in render_card(facts) and "learned task" not in render_card(
        facts
    )
