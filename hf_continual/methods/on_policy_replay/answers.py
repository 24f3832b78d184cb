"""What on-policy replay does with answers: writes them in batches that survive a kill, and chooses the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_continual.data.answered_rows import Asked
from hf_continual.data.sampling import Answer, Sampling, answers
from hf_continual.methods.pseudo_samples import one_each
from hf_continual.methods.run import Run
from hf_continual.methods.unfinished import Unfinished


def best(scores: Tensor, log_probabilities: Tensor, number: int) -> list[int]:
    """The places of the best answers.

    Args:
        scores: Score (N) of each answer; NaN for answers that must not be kept.
        log_probabilities: Mean log-probability (N) of each, which decides between equal scores; then the earlier one is better.
        number: How many to keep at most.

    Returns:
        Places of at most `number` answers, in ascending order.
    """
    pairs = zip(scores.tolist(), log_probabilities.tolist(), strict=True)
    able = [(-score, -likely, place) for place, (score, likely) in enumerate(pairs) if not math.isnan(score)]
    return sorted(place for _, _, place in sorted(able)[:number])


@dataclass
class Counts:
    """What happened to the answers of a task's prompts.

    Args:
        rows: Rows of the task.
        asked: Prompts that were answered.
        unusable: Rows that were drawn and have no prompt, no answer, or no room for one.
        unfinished: Answers without an end, although the row's own has one.
        empty: Answers of no token but an end.
        below: Answers below the threshold.
        outranked: Answers that others were better than.
        kept: Answers that later tasks replay.
        same: Kept answers that are the row's own, token by token.
        log_probability: Mean over kept answers of their mean log-probability, in nats per token.
    """

    rows: int = 0
    asked: int = 0
    unusable: int = 0
    unfinished: int = 0
    empty: int = 0
    below: int = 0
    outranked: int = 0
    kept: int = 0
    same: int = 0
    log_probability: float | None = None

    @property
    def rejected(self) -> int:
        """Answers that cannot be replayed, or are below the threshold."""
        return self.unfinished + self.empty + self.below


def choose(
    asked: Sequence[Asked],
    found: Sequence[Answer],
    ends: Collection[int],
    score: Callable[[Asked, Answer], float | None],
    wanted: int,
    counts: Counts,
) -> list[int]:
    """Choose the answers to keep, and count the others.

    Args:
        asked: The prompts.
        found: Their answers.
        ends: Tokens that end an answer.
        score: Score of an answer; None if it is below the threshold.
        wanted: How many to keep at most.
        counts: Where they are counted.

    Returns:
        Places of the kept answers, in ascending order.
    """
    scores = []
    for question, answer in zip(asked, found, strict=True):
        over = bool(answer.tokens) and answer.tokens[-1] in ends
        value = None
        if question.ended and not over:
            counts.unfinished += 1
        elif len(answer.tokens) <= over:
            counts.empty += 1
        elif (value := score(question, answer)) is None:
            counts.below += 1
        scores.append(math.nan if value is None else value)
    likely = [answer.log_probability for answer in found]
    chosen = best(torch.tensor(scores, dtype=torch.float64), torch.tensor(likely, dtype=torch.float64), wanted)
    counts.kept, counts.outranked = len(chosen), len(found) - counts.rejected - len(chosen)
    counts.same = sum(found[i].tokens == asked[i].answer for i in chosen)
    counts.log_probability = sum(likely[i] for i in chosen) / len(chosen) if chosen else None
    return chosen


def write_answers(
    run: Run, asked: Sequence[Asked], how: Sampling, batch_rows: int, ends: frozenset[int], unfinished: Unfinished
) -> list[Answer]:
    """Answer prompts with the model as it is, each batch on one process and with its own seed.

    Args:
        run: The run.
        asked: The prompts, those of similar length next to each other.
        how: How they are answered.
        batch_rows: Prompts answered at once.
        ends: Tokens that end an answer.
        unfinished: Storage of finished batches, which a killed run does not write again.

    Returns:
        One answer per prompt, the same for any number of processes.
    """
    done, kept = unfinished.read()
    found = _unpacked(kept) if done else []
    batches = [asked[i : i + batch_rows] for i in range(0, len(asked), batch_rows)]

    def write(batch: Sequence[Asked], place: int) -> list[Answer]:
        prompts, seed = [a.prompt for a in batch], (run.seed, run.task.index, place)
        with run.autocast():
            return answers(run.model, run.tokenizer, prompts, seed, how, ends)

    while done < len(batches):
        for texts in one_each(batches[done:], done, write):
            found, done = [*found, *texts], done + 1
        unfinished.write(done, _packed(found))
    return found


def _packed(found: Sequence[Answer]) -> dict[str, Tensor]:
    return {
        "lengths": torch.tensor([len(answer.tokens) for answer in found], dtype=torch.int64),
        "tokens": torch.tensor([token for answer in found for token in answer.tokens], dtype=torch.int64),
        "values": torch.tensor([answer.log_probability for answer in found], dtype=torch.float64),
    }


def _unpacked(kept: Any) -> list[Answer]:
    parts = kept["tokens"].split(kept["lengths"].tolist())
    return [Answer(part.tolist(), value) for part, value in zip(parts, kept["values"].tolist(), strict=True)]
