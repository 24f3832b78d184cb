"""Every assistant turn of a conversation as a separate question."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

from hf_continual.evaluation.result import RowScore, Scored
from hf_continual.evaluation.trained import Row, other_roles
from hf_continual.trl_data import is_conversational_from_value, maybe_convert_to_chatml

Turns = Literal["last", "all"]


def check_turns(turns: str) -> Turns:
    """Refuse an invalid choice of the turns to score.

    Args:
        turns: ``"last"`` or ``"all"``.

    Returns:
        The same.

    Raises:
        ValueError: If it is neither.
    """
    for known in get_args(Turns):
        if turns == known:
            return known
    raise ValueError(f"turns={turns!r} must be one of {', '.join(get_args(Turns))}.")


def assistant_turns(row: Row) -> list[dict[str, Any]]:
    """The answers of a conversation, each with everything before it as its prompt.

    Args:
        row: ``{"messages"}``, or ``{"prompt", "completion"}`` as messages, of which only the turns of the completion count.
            A row of text is one answer.

    Returns:
        Rows of prompt and completion, one for each assistant turn after the first message; tool calls are turns.

    Raises:
        ValueError: If there is no such turn.
    """
    plain = dict(row)
    if is_conversational_from_value(plain):
        plain = maybe_convert_to_chatml(copy.deepcopy(plain))
    prompt, completion = plain.get("prompt"), plain.get("completion")
    if isinstance(prompt, str) or isinstance(completion, str):
        return [plain]
    pair = prompt is not None and completion is not None
    messages = [*(prompt or ()), *(completion or ())] if pair else list(plain.pop("messages", None) or ())
    first = max(1, len(prompt or ())) if pair else 1
    places = [i for i in range(first, len(messages)) if messages[i].get("role") == "assistant"]
    if not places:
        raise ValueError(
            f"the row has no assistant turn after its first message (roles: "
            f"{', '.join(str(m.get('role')) for m in messages) or 'none'}). "
            + (other_roles(messages) or "Leave such rows out of the test.")
        )
    return [{**plain, "prompt": messages[:i], "completion": [messages[i]]} for i in places]


def by_turns(rows: Iterable[Any], score: Callable[[Sequence[Row]], Scored]) -> Scored:
    """Score every assistant turn; a row's score is the mean over its turns, so that a long conversation counts once.

    Args:
        rows: Conversations.
        score: Scores rows of one answer each.

    Returns:
        One entry per conversation, with its turns.

    Raises:
        ValueError: If a row has no assistant turn; the message says which.
    """
    split: list[list[dict[str, Any]]] = []
    for i, row in enumerate(rows):
        try:
            split.append(assistant_turns(row))
        except ValueError as error:
            raise ValueError(f"row {i}: {error}") from error
    flat = score([turn for turns in split for turn in turns])
    scored, done = [], 0
    for turns in split:
        parts = tuple(flat.rows[done : done + len(turns)])
        scored.append(_joined(parts))
        done += len(turns)
    return Scored(scored, f"{flat.protocol}, all assistant turns", flat.lower_is_better)


def _joined(parts: tuple[RowScore, ...]) -> RowScore:
    """Combine a row's turns into one score; its prediction is that of the last turn."""
    names = dict.fromkeys(name for part in parts for name in part.also)
    also = {name: sum(part.also.get(name, 0.0) for part in parts) / len(parts) for name in names}
    score = sum(part.score for part in parts) / len(parts)
    last = parts[-1]
    return RowScore(score, prediction=last.prediction, reference=last.reference, also=also, turns=parts)
