"""Choose among given answers by their likelihood.

With log p(c) the sum of the log-probabilities of the tokens of choice c after the prompt, the chosen answer is
argmax log p(c) ("sum", lm-eval's acc), argmax log p(c) / characters ("characters", lm-eval's acc_norm), or
argmax log p(c) / tokens ("tokens").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from hf_continual.ends import up_to_end
from hf_continual.evaluation.choices import Pair, log_likelihoods
from hf_continual.evaluation.exact_match import teacher_forced
from hf_continual.evaluation.questions import check_lengths, read_questions
from hf_continual.evaluation.result import RowScore, Scored
from hf_continual.evaluation.trained import Row, trained_tokens, with_answer
from hf_continual.evaluation.turns import Turns, by_turns, check_turns
from hf_continual.trl_data import common_prefix_length

if TYPE_CHECKING:
    from datasets import Dataset

Normalise = Literal["sum", "characters", "tokens"]


def label_likelihood(
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    labels: Sequence[str] | None = None,
    normalise: Normalise = "sum",
    batch_size: int = 16,
) -> Scored:
    """Classify by the most likely label, each including the token that ends it.

    The end is part of the comparison, as in training: without it, a label that is a prefix of another, such as " blue"
    of " blue red", would always be the more likely of the two. For lm-eval's numbers, which have no end, use
    `multiple_choice`.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        rows: ``{"prompt", "completion"}`` as strings or messages, or ``{"messages"}``; the answer is a label.
        labels: All labels as answers, with the space before them if rows are text; by default those that occur in
            the rows.
        normalise: How log-likelihoods of different lengths are compared.
        batch_size: Prompts per batch.

    Returns:
        1 for rows whose label is the most likely.

    Raises:
        ValueError: If a row's answer is not a label, two labels have the same tokens, or the logits are not numbers.
    """
    _check_rule(normalise)
    plain = [dict(row) for row in rows]
    questions = read_questions(model, tokenizer, plain)
    known = sorted({q.reference for q in questions}) if labels is None else _distinct(labels)
    for question in questions:
        if question.reference not in known:
            raise ValueError(
                f"the answer {question.reference!r} is not one of the labels {known}; mind the space before it."
            )
    pairs = [
        [_labelled(row, label, question.ends, tokenizer) for label in known]
        for row, question in zip(plain, questions, strict=True)
    ]
    for offered in pairs[:1]:
        _check_apart([prompt + answer for prompt, answer in offered], known)
    check_lengths(model, [max(len(p) + len(a) for p, a in offered) for offered in pairs])
    scored = []
    values = log_likelihoods(model, tokenizer, pairs, batch_size)
    for question, of_row in zip(questions, values, strict=True):
        best = known[_best(of_row, known, normalise)]
        scored.append(RowScore(float(best == question.reference), prediction=best, reference=question.reference))
    return Scored(scored, f"most likely of {len(known)} labels, by {normalise}")


def _labelled(row: dict[str, Any], label: str, ends: frozenset[int], tokenizer: Any) -> Pair:
    prompt, answer = trained_tokens(with_answer(row, label), tokenizer)
    return prompt, up_to_end(answer, ends)


def _distinct(labels: Sequence[str]) -> list[str]:
    if isinstance(labels, str):
        raise ValueError(f"labels={labels!r} is a single text; give a list of labels.")
    return list(dict.fromkeys(labels))


def _check_apart(tokens: Sequence[list[int]], labels: Sequence[str]) -> None:
    for i, own in enumerate(tokens):
        if own in tokens[:i]:
            raise ValueError(
                f"the labels {labels[tokens.index(own)]!r} and {labels[i]!r} have the same tokens, so they cannot "
                f"be told apart. Merge them, or rename one."
            )


def multiple_choice(
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    normalise: Normalise = "characters",
    batch_size: int = 16,
) -> Scored:
    """Score multiple choice as lm-eval does: the choice after the context and a space, without an end.

    As there, a choice that is a prefix of another is always more likely by "sum"; use `label_likelihood` for such answers.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        rows: ``{"context", "choices", "answer"}``; `answer` is the index of the right choice.
        normalise: "characters" is lm-eval's acc_norm, "sum" its acc.
        batch_size: Contexts per batch.

    Returns:
        1 for rows whose right choice is the most likely.

    Raises:
        ValueError: If a column is missing, an answer is not the index of a choice, or the logits are not numbers.
    """
    _check_rule(normalise)
    if missing := {"context", "choices", "answer"} - set(rows.column_names):
        raise ValueError(f"multiple choice needs the column {sorted(missing)[0]!r}; the rows have {rows.column_names}.")
    plain = [dict(row) for row in rows]
    for i, row in enumerate(plain):
        if not 0 <= int(row["answer"]) < len(row["choices"]):
            raise ValueError(
                f"row {i} has the answer {row['answer']!r} and {len(row['choices'])} choices; the answer must be the index of "
                f"one, counted from 0."
            )
    pairs = [[_as_lm_eval(row["context"], " " + choice, tokenizer) for choice in row["choices"]] for row in plain]
    check_lengths(model, [max(len(p) + len(a) for p, a in offered) for offered in pairs])
    scored = []
    for row, of_row in zip(plain, log_likelihoods(model, tokenizer, pairs, batch_size), strict=True):
        offered, right = row["choices"], int(row["answer"])
        best = _best(of_row, offered, normalise)
        scored.append(RowScore(float(best == right), prediction=offered[best], reference=offered[right]))
    return Scored(scored, f"multiple choice, {'acc_norm' if normalise == 'characters' else 'acc'} by {normalise}")


def _as_lm_eval(context: str, choice: str, tokenizer: Any) -> Pair:
    """Split as lm-eval does: by the number of the context's tokens, no second BOS, BOS or end as an empty context."""
    if context == "":
        tokens = list(tokenizer(choice, add_special_tokens=False)["input_ids"])
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return (tokens[:1], tokens[1:]) if tokens[0] == first else ([first], tokens)
    begins = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    has_one = begins is not None and context.startswith(tokenizer.decode(begins))
    options = {"add_special_tokens": False} if has_one else {}
    bare = context.rstrip()
    prompt = list(tokenizer(bare, **options)["input_ids"])
    whole = list(tokenizer(context + choice, **options)["input_ids"])
    return prompt, whole[len(prompt) :]


def answer_nll(
    model: Any, tokenizer: Any, rows: Dataset | Sequence[Row], batch_size: int = 32, turns: Turns = "last"
) -> Scored:
    """Negative log-likelihood per token of the right answer, in nats; lower is better.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        rows: ``{"prompt", "completion"}`` as strings or messages, or ``{"messages"}``.
        batch_size: Rows per forward pass.
        turns: As in `teacher_forced`.

    Returns:
        For each row, the mean over the answer's tokens and its end.
    """
    if check_turns(turns) == "all":
        return by_turns(rows, lambda flat: answer_nll(model, tokenizer, flat, batch_size))
    forced = teacher_forced(model, tokenizer, rows, batch_size)
    losses = [RowScore(r.also["nll"], prediction=r.prediction, reference=r.reference, also=r.also) for r in forced.rows]
    return Scored(losses, "answer NLL per token", lower_is_better=True)


def _check_rule(normalise: str) -> None:
    if normalise not in get_args(Normalise):
        raise ValueError(f"normalise={normalise!r} must be one of {', '.join(get_args(Normalise))}.")


def _best(values: Sequence[tuple[float, int]], choices: Sequence[str], normalise: Normalise) -> int:
    sizes = {
        "sum": [1.0] * len(choices),
        "characters": [float(max(len(c), 1)) for c in choices],
        "tokens": [float(n) for _, n in values],
    }
    ratios = [v / size for (v, _), size in zip(values, sizes[normalise], strict=True)]
    return max(range(len(ratios)), key=ratios.__getitem__)


def choice_log_likelihoods(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    batch_size: int = 16,
    share_prompt: bool = True,
) -> list[list[tuple[float, int]]]:
    """Log-likelihood of each choice after its prompt, without an end of sequence.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: One per row, as text.
        choices: The choices of each row, as text with the space before them.
        batch_size: Prompts per batch.
        share_prompt: Whether to compute a prompt once for all its choices.

    Returns:
        For each row and choice, the sum of the log-probabilities in nats, and the number of tokens.
    """
    pairs = [
        [_joined(prompt, choice, tokenizer) for choice in offered]
        for prompt, offered in zip(prompts, choices, strict=True)
    ]
    return log_likelihoods(model, tokenizer, pairs, batch_size, share_prompt)


def _joined(prompt: str, choice: str, tokenizer: Any) -> Pair:
    """Join a prompt and a choice: a tokenizer may merge the prompt's last letters with the choice, so all tokens that differ count."""
    first, whole = list(tokenizer(prompt)["input_ids"]), list(tokenizer(prompt + choice)["input_ids"])
    shared = common_prefix_length(first, whole)
    return whole[:shared], whole[shared:]
