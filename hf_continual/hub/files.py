"""A complete folder: card, configuration, results and plots next to the model."""

from __future__ import annotations

import contextlib
import platform
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np

from hf_continual.atomic_files import DamagedFile, read_json, write_json, write_text
from hf_continual.hub.card import render_card
from hf_continual.hub.facts import CONFIG, RESULTS, CardFacts, MergeFacts
from hf_continual.hub.folder_facts import evaluation_to, with_learned
from hf_continual.hub.text import safe

README = "README.md"
PACKAGES = ("hf-continual", "trl", "transformers", "peft", "torch", "datasets")
FORGETTING, MATRIX, WEIGHTS = "plots/forgetting.png", "plots/matrix.png", "plots/merge_weights.png"


def write_card(folder: Path, facts: CardFacts, existing: str | None = None) -> CardFacts:
    """Write README.md, continual_config.json, continual_results.json and the plots; the same facts give the same bytes.

    Args:
        folder: The model's folder.
        facts: The facts.
        existing: The card whose author's text is kept; by default the folder's.

    Returns:
        The facts, with the plots that were drawn.
    """
    if existing is None and (folder / README).is_file():
        existing = (folder / README).read_text(encoding="utf-8", errors="replace")
    facts = with_learned(facts, folder)
    facts = replace(facts, plots={**facts.plots, **_draw(folder, facts)})
    if facts.merge is not None and facts.merge.weights and facts.merge.image is None:
        _draw_weights(folder, facts.merge)
        facts = replace(facts, merge=replace(facts.merge, image=WEIGHTS))
    # After the plots: a results file means that the plots show these numbers and need not be drawn again.
    write_json(folder / RESULTS, evaluation_to(facts.evaluation))
    write_json(folder / CONFIG, {"format": 1, "relation": facts.relation, **safe(facts.to_dict())})
    write_text(folder / README, render_card(facts, existing or ""))
    return facts


def _draw(folder: Path, facts: CardFacts) -> dict[str, str]:
    """Draw the plots that the numbers allow, without a date, so that a second push has no changes."""
    evaluation = facts.evaluation
    if not evaluation.matrix or evaluation.row_names is not None:
        return {}
    drawn = {"forgetting": FORGETTING, "matrix": MATRIX} if len(evaluation.tasks) > 1 else {"matrix": MATRIX}
    results = folder / RESULTS
    if all((folder / name).is_file() for name in drawn.values()) and results.is_file():
        # A damaged file says nothing about plots, and is rewritten afterwards.
        with contextlib.suppress(DamagedFile):
            if read_json(results) == evaluation_to(evaluation):
                return drawn
    from hf_continual.plots import plot_matrix, plot_stages

    (folder / "plots").mkdir(parents=True, exist_ok=True)
    plain = {"Software": None}
    if len(evaluation.tasks) > 1:
        figure = plot_stages(
            [list(r) for r in evaluation.accuracy.scores], list(evaluation.tasks), evaluation.accuracy.base,
            evaluation.lower_is_better,
        )  # fmt: skip
        figure.savefig(folder / FORGETTING, dpi=120, metadata=plain)
    figure = plot_matrix(
        evaluation.accuracy.scores, list(evaluation.tasks), evaluation.accuracy.base, evaluation.metric or "",
        evaluation.lower_is_better or any(v is not None and not 0 <= v <= 1 for r in evaluation.matrix for v in r),
    )  # fmt: skip
    figure.savefig(folder / MATRIX, dpi=120, metadata=plain)
    return drawn


def _draw_weights(folder: Path, merge: MergeFacts) -> None:
    """Plot the weights of a merge as a heat map."""
    from hf_continual.plots import plot_layer_weights

    assert merge.weights is not None
    names = [ref.hub_id or ref.name or f"model {i}" for i, ref in enumerate(merge.inputs)]
    (folder / WEIGHTS).parent.mkdir(parents=True, exist_ok=True)
    weights = np.array([list(w) for w in merge.weights.values()]).T
    plot_layer_weights(weights, list(merge.weights), names).savefig(
        folder / WEIGHTS, dpi=120, metadata={"Software": None}
    )


def installed_versions() -> dict[str, str]:
    """Versions of the packages that make a model, and of Python."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
