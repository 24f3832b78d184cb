"""What the page shows in which part, and what it says where there is nothing to show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_continual.report import tables
from hf_continual.report.figures import comparison_picture, forgetting_picture, frontier_picture, matrix_picture
from hf_continual.report.page import Section
from hf_continual.report.run import Run
from hf_continual.report.style import looks
from hf_continual.report.time_figures import benchmarks_picture, gauges_picture, layer_picture, training_pictures

MOST_LAYERS = 24

Arms = Mapping[str, Mapping[str, Any]]


def sections_of(
    runs: Sequence[Run],
    alike: Sequence[Run],
    arms: Arms,
    tests: Sequence[Mapping[str, Any]],
    plain: Sequence[Mapping[str, Any]] = (),
) -> list[Section]:
    """The parts of the page.

    Args:
        runs: All runs.
        alike: Those that can share a picture.
        arms: Their arms.
        tests: Paired tests.
        plain: Those against the best plain run.

    Returns:
        The parts, in order; their pictures are drawn and not yet turned into SVG.
    """
    lower = bool(alike and alike[0].lower)
    return [
        _summary(runs),
        _matrices(runs),
        _forgetting(runs, alike),
        _gauges(runs),
        _comparison(alike, arms, tests, plain, lower),
        _frontier(alike, arms, lower),
        _layers(runs),
        _answers(runs),
        _configuration(runs),
        _cost(runs),
    ]


def _summary(runs: Sequence[Run]) -> Section:
    section = Section("summary", "Summary")
    scored = [run for run in runs if run.summary or run.gauges]
    if scored:
        section.tables.append(tables.summary_table(scored))
    else:
        section.missing.append("No run has scores.")
    return section


def _matrices(runs: Sequence[Run]) -> Section:
    section = Section("matrix", "Accuracy matrix")
    for i, run in enumerate(runs):
        if run.scores:
            section.pending.append(matrix_picture(run, f"matrix-{i + 1}"))
            section.folded.append(tables.matrix_table(run))
    if not section.pending:
        section.missing.append(
            "No accuracy matrix: no task was scored after training. Give the plan's tasks `test` rows."
        )
    elif bare := [run.name for run in runs if run.scores and run.base is None]:
        section.missing.append(
            f"No base row: the base model of {', '.join(bare)} was not scored (evaluation: {{base: true}})."
        )
    return section


def _forgetting(runs: Sequence[Run], alike: Sequence[Run]) -> Section:
    section = Section("forgetting", "Forgetting curves")
    curved = [run for run in alike if run.scores and (len(run.scores) > 1 or run.base is not None)]
    if curved:
        section.pending.append(forgetting_picture(curved, "forgetting"))
    else:
        section.missing.append(
            "No forgetting curves: they need scores at two stages, such as the base model's and a task's."
        )
    section.pending += training_pictures(runs, "training")
    return section


def _gauges(runs: Sequence[Run]) -> Section:
    section = Section("gauges", "Gauges over time")
    after, during = benchmarks_picture(runs, "benchmarks"), gauges_picture(runs, "gauges")
    section.pending += [picture for picture in (after, during) if picture is not None]
    if after is None:
        section.missing.append(
            "No general benchmarks after each task: none were measured. A plan names them in evaluation: {gauges: ...}."
        )
    if during is None:
        section.missing.append("No gauges during training: no task's folder holds continual/gauges.jsonl.")
    if (events := tables.events_table(runs)) is not None:
        section.tables.append(events)
    return section


def _comparison(
    alike: Sequence[Run],
    arms: Arms,
    tests: Sequence[Mapping[str, Any]],
    plain: Sequence[Mapping[str, Any]],
    lower: bool,
) -> Section:
    section = Section("comparison", "Methods compared")
    if len(arms) > 1:
        own = looks(alike)
        section.pending.append(comparison_picture(arms, "comparison", lower, own))
        section.tables.append(tables.arms_table(arms, lower))
    else:
        section.missing.append("Nothing to compare: there is one run. Name several folders, or a sweep.")
    if tests:
        overall, by_task = ([t for t in tests if (t["task"] == "overall") == all_tasks] for all_tasks in (True, False))
        section.tables.append(tables.tests_table(overall, lower))
        section.folded += [tables.tests_table(by_task, lower, "Task by task")] * bool(by_task)
    elif len(arms) > 1:
        section.missing.append("No paired tests: they need two runs of plans with predictions on the same test rows.")
    if plain:
        section.tables.append(tables.plain_table(plain, lower))
    elif len(arms) > 1:
        section.missing.append(
            "No comparison with the best plain run: none of these fine-tuned plainly, or on other rows. A plan makes them: "
            "baselines: {learning_rates: [x, x/3, x/10]}."
        )
    return section


def _frontier(alike: Sequence[Run], arms: Arms, lower: bool) -> Section:
    section = Section("frontier", "Learning against retention")
    complete = {
        name: arm for name, arm in arms.items() if {"learning_accuracy", "backward_transfer"} <= set(arm["figures"])
    }
    if complete:
        section.pending.append(frontier_picture(complete, "frontier", lower, looks(alike)))
    else:
        section.missing.append("No frontier: it needs a run that has learned two tasks and was scored after each.")
    return section


def _layers(runs: Sequence[Run]) -> Section:
    section = Section("layers", "Layer by layer")
    every = [(run, layers) for run in runs for layers in run.layers]
    for i, (run, layers) in enumerate(every[:MOST_LAYERS]):
        section.pending.append(layer_picture(layers, run, f"layers-{i + 1}"))
    if len(every) > MOST_LAYERS:
        section.missing.append(
            f"The first {MOST_LAYERS} of {len(every)} pictures by layer are shown. Name fewer folders to see the others."
        )
    if not every and not any(run.diagnoses for run in runs):
        section.missing.append("No evidence by layer: the folders hold neither a merge report nor a diagnosis.json.")
    elif not any(run.diagnoses for run in runs):
        section.missing.append("No update angles: no folder holds a diagnosis.json.")
    return section


def _answers(runs: Sequence[Run]) -> Section:
    section = Section("answers", "Answers that changed")
    counted = [run for run in runs if run.changes.counts]
    if not counted:
        section.missing.append(
            "Which answers changed is not known: no folder holds predictions on the same rows at two stages"
            + (" (losses are neither right nor wrong)." if any(run.lower for run in runs) else ".")
        )
        return section
    section.tables.append(tables.changes_table(counted))
    section.folded.append(tables.changes_table(counted, by_task=True))
    for run in counted:
        changed = run.changes.total("lost") + run.changes.total("regained")
        if changed > len(run.changes.shown):
            section.missing.append(
                f"{run.name}: {len(run.changes.shown):,} of {changed:,} changed answers are shown with their text, in turn from each task "
                f"(--predictions {changed} shows all)."
            )
        elif not changed:
            section.missing.append(f"{run.name}: no answer that was once right became wrong.")
        if run.changes.graded:
            names = ", ".join(run.changes.graded)
            section.missing.append(
                f"{run.name}: rows of {names} have graded scores; there a row counts as right from 0.5 on."
            )
    return section


def _configuration(runs: Sequence[Run]) -> Section:
    section = Section("configuration", "Configuration")
    if (table := tables.settings_table(runs)) is not None:
        section.tables.append(table)
    else:
        section.missing.append("No configuration: no folder holds a plan.json, settings or continual_config.json.")
    return section


def _cost(runs: Sequence[Run]) -> Section:
    section = Section("cost", "Cost")
    table = tables.cost_table(runs)
    if table is not None:
        section.tables.append(table)
    names = {"seconds": "training time", "tokens": "tokens", "memory_bytes": "peak memory"}
    absent = [
        word for key, word in names.items() if not any(entry[key] is not None for run in runs for entry in run.cost)
    ]
    if absent:
        section.missing.append(f"Not recorded: {', '.join(absent)}.")
    return section
