"""The scorers by name, and scorers built from plain data. Importing this module imports no scorer."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hf_continual.evaluation.result import RowScore, Scored
from hf_continual.named import did_you_mean, imported

Scorer = Callable[..., Scored]

SCORERS: dict[str, str] = {
    "exact_match": "hf_continual.evaluation.exact_match:teacher_forced",
    "teacher_forced": "hf_continual.evaluation.exact_match:teacher_forced",
    "generated": "hf_continual.evaluation.exact_match:generated",
    "label_likelihood": "hf_continual.evaluation.likelihood:label_likelihood",
    "multiple_choice": "hf_continual.evaluation.likelihood:multiple_choice",
    "answer_nll": "hf_continual.evaluation.likelihood:answer_nll",
    "general_loss": "hf_continual.evaluation.general:general_loss",
    "lm_eval": "hf_continual.evaluation.harness:lm_eval",
}

# Columns that a scorer reads; prompt and completion by default.
COLUMNS: dict[str, tuple[str, ...]] = {
    "multiple_choice": ("context", "choices", "answer"),
    "general_loss": ("text",),
    "lm_eval": (),
}


def build_scorer(description: Any, batch_size: int | None = None) -> Scorer:
    """Build a scorer from data: a name, or a mapping of one name to its options.

    Args:
        description: ``"exact_match"``, ``{"generated": {"match": "rougeL", "stop": ["\\n"]}}``, the path of your own
            function as ``"package.module:function"``, or a function. A function is called with
            (model, tokenizer, rows) and returns `Scored` or one number per row.
        batch_size: Rows per forward pass, for scorers that take one and are not given one.

    Returns:
        A function of (model, tokenizer, rows).

    Raises:
        TypeError: If the description is none of the above.
        ValueError: If the name or an option is unknown.
    """
    name, options = _name_and_options(description)
    function = description if name is None else _find(name)
    shown = name or getattr(function, "__name__", repr(function))
    known = list(inspect.signature(function).parameters)[3:]
    if unknown := [k for k in options if k not in known]:
        hint = did_you_mean(unknown[0], known)
        raise ValueError(
            f"the metric {shown} has no option {unknown[0]!r}.{hint} The options are {', '.join(known) or 'none'}."
        )
    if batch_size is not None and "batch_size" in known:
        options = {"batch_size": batch_size, **options}
    if "match" in options:
        from hf_continual.evaluation.match import find_match

        find_match(options["match"])  # pyrefly: ignore[bad-argument-type]
    return functools.partial(_scored, function, shown, options)


def columns_of(description: Any, present: Sequence[str] = ()) -> tuple[str, ...]:
    """The columns that rows need for a scorer; empty for your own function.

    Args:
        description: See `build_scorer`.
        present: Columns that the rows have; conversations count as prompt and completion.

    Returns:
        Names of columns.
    """
    name, _ = _name_and_options(description)
    if name is None or ":" in name:
        return ()
    wanted = COLUMNS.get(name, ("prompt", "completion"))
    whole = [c for c in ("messages", "conversations") if c in present]
    return (whole[0],) if whole and wanted == ("prompt", "completion") and not set(wanted) <= set(present) else wanted


def check_answers(description: Any, rows: Any, tokenizer: Any) -> None:
    """Refuse rows without an answer for a scorer that needs one, before a model is loaded.

    Args:
        description: See `build_scorer`.
        rows: The rows, with the columns of `columns_of`.
        tokenizer: The model's.

    Raises:
        ValueError: If a row does not have exactly one answer, or rows are conversations and the tokenizer has no chat template.
    """
    name, options = _name_and_options(description)
    if name is None or ":" in name or COLUMNS.get(name, ("prompt", "completion")) != ("prompt", "completion"):
        return
    from hf_continual.evaluation.questions import check_one_answer
    from hf_continual.evaluation.trained import as_pair
    from hf_continual.evaluation.turns import assistant_turns

    for i, row in enumerate(rows):
        try:
            asked = assistant_turns(row) if options.get("turns") == "all" else [as_pair(row)]
            for pair in asked:
                check_one_answer(pair)
        except ValueError as error:
            raise ValueError(f"row {i + 1} of the rows to score: {error}") from error
        if not isinstance(asked[0]["prompt"], str) and getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                "the rows to score are conversations, but the tokenizer has no chat template to render "
                "them with. Give the tokenizer of the chat model, model: {path: ..., tokenizer: ...}, or give prompt and completion as text."
            )


def with_labels(description: Any, rows: Any) -> Any:
    """Fix the labels of `label_likelihood` from all rows, so that a process that scores a part of the rows has all labels."""
    name, options = _name_and_options(description)
    if name != "label_likelihood" or options.get("labels") is not None:
        return description
    from hf_continual.evaluation.trained import reference

    return {name: {**options, "labels": sorted({reference(row) for row in rows})}}


def _name_and_options(description: Any) -> tuple[str | None, dict[str, Any]]:
    if callable(description):
        return None, {}
    if isinstance(description, str):
        return description, {}
    if isinstance(description, Mapping) and len(description) == 1:
        name, options = next(iter(description.items()))
        if options is None or isinstance(options, Mapping):
            return str(name), dict(options or {})
    raise TypeError(f"a metric must be a name, or a mapping of one name to its options; got {description!r}.")


def _find(name: str) -> Callable[..., Any]:
    target = SCORERS.get(name, name if ":" in name else None)
    if target is None:
        hint = did_you_mean(name, SCORERS)
        raise ValueError(
            f"unknown metric {name!r}.{hint} The metrics are {', '.join(SCORERS)}; your own function is named "
            f"'package.module:function'."
        )
    try:
        return imported(target)
    except ImportError as error:
        raise ValueError(f"the metric {name!r} cannot be imported: {error}.") from error


def _scored(
    function: Callable[..., Any], name: str, options: Mapping[str, Any], model: Any, tokenizer: Any, rows: Any
) -> Scored:
    """Call a scorer and check what it returned."""
    result = function(model, tokenizer, rows, **options)
    if isinstance(result, Sequence) and all(isinstance(v, bool | int | float) for v in result):
        result = Scored([RowScore(float(v)) for v in result], name)
    if isinstance(result, Scored) and any(math.isnan(row.score) for row in result.rows):
        raise ValueError(
            f"the metric {name} returned scores that are not numbers (NaN); a mean over them says nothing."
        )
    if not isinstance(result, Scored):
        raise TypeError(
            f"the metric {name} returned {type(result).__name__}; a scorer must return Scored, or one number per row."
        )
    if rows is not None and len(result.rows) != len(rows):
        raise ValueError(f"the metric {name} returned {len(result.rows)} scores for {len(rows)} rows.")
    return result
