"""Scores of a moment and the predictions that they rest on: written together, and believed only together.

A score carries a checksum over itself and its file of predictions. Where the two do not agree, because one was cut,
edited or removed, nothing is taken for measured: the score is left out, and measured again by the next run.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_continual.atomic_files import CHECKSUM, DamagedFile, checksum, read_json, write_json, write_lines
from hf_continual.evaluation.files import SCORES, predictions_file
from hf_continual.evaluation.result import RowScore, Scored
from hf_continual.tasks import Task, TaskStream

logger = logging.getLogger(__name__)

PARTIAL = ".partial"


def keep_score(folder: Path, stage: str, output_dir: Path, task: Task, scored: Scored) -> None:
    """Write predictions, then the score that rests on them."""
    rows = task.test if task.test is not None else [{} for _ in scored.rows]
    file = predictions_file(output_dir, stage, task.name)
    write_lines(file, prediction_lines(rows, scored))
    _add(folder, task.name, score_entry(scored), file)
    value = scored.score.value
    logger.info("%s: %s = %.4f", stage, task.name, value if value is not None else float("nan"))


def prediction_lines(rows: Iterable[Any], scored: Scored) -> list[dict[str, Any]]:
    """What a model said to each row, as files of predictions hold it.

    Args:
        rows: The rows; an empty one where its prompt is not known.
        scored: Their scores, in the same order.

    Returns:
        A line per row.
    """
    from hf_continual.evaluation.prompts import prompt_hash  # imports torch, which reading scores does not need

    return [
        {
            "row_id": i, "prompt_hash": prompt_hash(dict(row)), **_shown_prompt(dict(row)), "prediction": r.prediction,
            "reference": r.reference, "score": r.score, **({"weight": r.weight} if r.weight != 1 else {}), **r.also,
            **({"turns": [_turn(t) for t in r.turns]} if r.turns else {}),
        }
        for i, (row, r) in enumerate(zip(rows, scored.rows, strict=True))
    ]  # fmt: skip


def score_entry(scored: Scored) -> dict[str, Any]:
    """A score as plain data, with the answers' loss where that is not the score itself."""
    loss = {} if scored.nll is None or scored.lower_is_better else {"nll": scored.nll.to_dict()}
    return {**scored.score.to_dict(), **loss}


def _shown_prompt(row: dict[str, Any]) -> dict[str, str]:
    """The prompt's text, so that a prediction can be read without the rows; left out where a row has none."""
    from hf_continual.evaluation.prompts import prompt_text

    text = prompt_text(row)
    return {"prompt": text} if text else {}


def _turn(turn: RowScore) -> dict[str, Any]:
    return {"prediction": turn.prediction, "reference": turn.reference, "score": turn.score, **turn.also}


def keep_error(folder: Path, name: str, protocol: str, error: str) -> None:
    """Write that an evaluation failed; it is measured again by the next attempt."""
    entry = {"value": None, "n": 0, "protocol": protocol, "status": "ERROR", "error": error}
    _add(folder, name, entry, _predictions_of(folder, name))


def _add(folder: Path, name: str, entry: dict[str, Any], predictions: Path) -> None:
    kept = {n: cell for n, cell in _stored(folder).items() if n != name}
    write_json(folder / SCORES, {**kept, name: {**entry, CHECKSUM: _sum(entry, predictions)}})


def _sum(entry: dict[str, Any], predictions: Path) -> str:
    """Checksum of a score and of what it rests on; an evaluation that failed rests on nothing."""
    rests_on = None
    if entry.get("status") == "MEASURED":
        rests_on = hashlib.sha256(predictions.read_bytes()).hexdigest() if predictions.is_file() else "missing"
    return checksum({"score": entry, "predictions": rests_on})


def _predictions_of(folder: Path, task: str) -> Path:
    return predictions_file(folder.parent, folder.name.removesuffix(PARTIAL), task)


def read_stage(folder: Path) -> dict[str, Any]:
    """The scores of a moment by name, as far as they can be believed; empty where there are none.

    Args:
        folder: The moment's folder in the run's folder, such as ``out/task-00-cities`` or ``out/base``.

    Returns:
        Score by task. One that is not what was written, or whose predictions are not, is left out with a warning.
    """
    found = {}
    for name, cell in _stored(folder).items():
        entry = {k: v for k, v in cell.items() if k != CHECKSUM}
        file = _predictions_of(folder, name)
        if cell.get(CHECKSUM) == _sum(entry, file):
            found[name] = entry
        else:
            logger.warning(
                "the score of %s in %s and %s do not belong together (one was changed, cut or removed): it does not count "
                "and is measured again.", name, folder / SCORES, file,
            )  # fmt: skip
    return found


def _stored(folder: Path) -> dict[str, dict[str, Any]]:
    """What stands in the file of scores; a damaged one holds nothing."""
    file = folder / SCORES
    if not file.is_file():
        return {}
    try:
        data = read_json(file)
    except DamagedFile as error:
        logger.warning("%s The scores of this moment are lost; they are measured again.", error)
        return {}
    return {n: c for n, c in data.items() if isinstance(c, dict)} if isinstance(data, dict) else {}


def read_scores(stream: TaskStream, output_dir: Path) -> list[list[float | None]]:
    """The rows of the accuracy matrix of the tasks that are finished."""
    rows: list[list[float | None]] = []
    for task in stream:
        scores = read_stage(output_dir / task.folder)
        if not scores:
            break
        rows.append([scores.get(t.name, {}).get("value") for t in stream])
    return rows
