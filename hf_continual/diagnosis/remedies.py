"""What a diagnosis suggests, as commands. The choices are rules of thumb, and each says what in the evidence speaks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_continual.diagnosis.result import Judgement, Remedy

WORTH = 0.05  # of the held rows' score: what a point of the line must be better by


def remedies_of(
    judged: Judgement,
    named: Mapping[str, str],
    layers: Sequence[Mapping[str, Any]],
    line: Sequence[Mapping[str, float]],
    settings: Mapping[str, Any],
) -> list[Remedy]:
    """Suggest what to do, most promising first.

    Args:
        judged: The verdict.
        named: ``before``, ``after``, ``rows`` and, for adapters, ``below``, the model that they sit on, as the user named them.
        layers: Evidence by layer.
        line: Scores along the line.
        settings: Of the short training: steps, learning_rate, shown.

    Returns:
        The remedies; none where nothing was forgotten.
    """
    if judged.verdict == "none":
        return []
    found = []
    if judged.verdict == "spurious":
        found += [_realign(judged, named, settings), _freeze(named, layers)]
    if merge := _merge(named, line):
        found.append(merge)
    found.append(_replay(judged, named))
    if judged.verdict == "undecided":
        found.reverse()
    return found


def _realign(judged: Judgement, named: Mapping[str, str], settings: Mapping[str, Any]) -> Remedy:
    regained = judged.tests["regained"].difference
    return Remedy(
        f"realign with {settings['shown']} rows",
        f"{settings['steps']} steps on them brought back {regained:+.3f} on rows that were not shown; mix in new rows, or score the new "
        f"task after it",
        f"hf-continual train --model {named['after']} --train {named['rows']} --steps {settings['steps']} --set "
        f"learning_rate={settings['learning_rate']:g} --set per_device_train_batch_size={settings['batch_size']} --out realigned",
    )


def _freeze(named: Mapping[str, str], layers: Sequence[Mapping[str, Any]]) -> Remedy:
    blocks, half = bottom(layers)
    why = f"the states of the bottom {blocks} of {half} blocks account for half of the loss of likeness (1 - CKA)"
    return Remedy(
        f"learn the new task again from BEFORE with the embeddings and the bottom {blocks} frozen",
        why,
        f"hf-continual train --model {named['before']} --train NEW_ROWS.jsonl --methods '{{freeze: {{bottom: {blocks}}}}}' --out frozen",
    )


def bottom(layers: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """How many bottom blocks to freeze: as many as account for half of the states' loss of likeness, and at most half of all.

    Args:
        layers: Evidence by layer, with ``cka``.

    Returns:
        The number, at least 1, and the number of blocks.
    """
    blocks = [entry for entry in layers if str(entry["layer"]).startswith("layer.")]
    lost = [1 - entry["cka"] if entry.get("cka") is not None else 0.0 for entry in blocks]
    least = max(lost, default=0.0) / 2
    reached = next((i + 1 for i, value in enumerate(lost) if value >= least > 0), 1)
    return max(1, min(reached, len(blocks) // 2)), len(blocks)


def _merge(named: Mapping[str, str], line: Sequence[Mapping[str, float]]) -> Remedy | None:
    """A point between the two that keeps much more of the old rows, nearest to AFTER."""
    if not line:
        return None
    end = line[-1]["score"]
    better = [p for p in line[1:-1] if p["score"] >= end + WORTH]
    if not better:
        return None
    best = max(better, key=lambda p: p["score"])
    share = best["share"]
    base = f" --base {named['below']}" if named.get("below") else ""
    return Remedy(
        f"merge {1 - share:.0%} of BEFORE back",
        f"at that point of the line the held rows score {best['score']:.3f}, AFTER {end:.3f}; score the new task too",
        f"hf-continual merge linear {named['before']} {named['after']}{base} --weights {1 - share:g},{share:g} --out merged",
    )


def _replay(judged: Judgement, named: Mapping[str, str]) -> Remedy:
    why = {
        "real": "what is gone must be learned again, so it is better not lost: rows of the old task among the new ones",
        "spurious": "rows of the old task among the new ones keep both aligned",
        "undecided": "helps whichever it is",
    }[judged.verdict]
    return Remedy(
        "learn the new task again from BEFORE with replay",
        why,
        f"hf-continual train --model {named['before']} --train NEW_ROWS.jsonl --methods '{{replay: {{rows: {named['rows']}, ratio: 0.2}}}}' "
        f"--out replayed",
    )
