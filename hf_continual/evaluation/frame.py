"""What a chat template puts around an answer, to separate the answer's text and end from it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_continual.ends import AddedTokens
from hf_continual.evaluation.trained import Row, as_pair, rendered, with_answer
from hf_continual.trl_data import common_prefix_length

_ANSWER = "answerxyz"  # stands in for the answer while a template is inspected


@dataclass(frozen=True)
class Frame:
    """The text before and after an answer in a conversation as it is trained.

    Args:
        lead: Text between the generation prompt and the answer, such as an empty block of thoughts.
        tail: Text after the answer.
        mark: The last of the tokenizer's added tokens in `lead`; None if there is none.
        end: The token in `tail` that ends the turn; None if the template ends it with plain text.
    """

    lead: str = ""
    tail: str = ""
    mark: int | None = None
    end: int | None = None


def frame_of(row: Row, tokenizer: Any, ends: Collection[int], added: AddedTokens) -> Frame:
    """Inspect the template of a conversation; rows of plain text have no frame.

    Args:
        row: A row to score.
        tokenizer: With a chat template if the row is a conversation.
        ends: Tokens that always end an answer.
        added: The tokenizer's added tokens.

    Returns:
        The frame of the row's answer.

    Raises:
        ValueError: If the template leaves the answer out, or the tools that it calls.
    """
    pair = as_pair(row)
    if isinstance(pair["prompt"], str):
        return Frame()
    around = _around_text(pair, tokenizer, ends, added)
    return _around_calls(pair, tokenizer, added, around) if pair["completion"][-1].get("tool_calls") else around


def _around_text(pair: Row, tokenizer: Any, ends: Collection[int], added: AddedTokens) -> Frame:
    """The frame of an answer in words."""
    known = with_answer(pair, _ANSWER)
    prompt = rendered(known, tokenizer, known["prompt"], True, tokenize=False)
    whole = rendered(known, tokenizer, [*known["prompt"], *known["completion"]], False, tokenize=False)
    before, found, tail = whole.rpartition(_ANSWER)
    if not found:
        raise ValueError(
            "the chat template leaves the text of the last message out, so there is no answer to score. Is its role "
            f"{known['completion'][-1].get('role')!r} one that the template knows?"
        )
    lead = before[common_prefix_length(prompt, before) :]
    marks = [i for i in _tokens(lead, tokenizer) if i in added.texts]
    kinds = (added.special.union(ends), added.texts.keys())
    after = [i for i in _tokens(tail, tokenizer) if i != tokenizer.unk_token_id]
    # The first special token ends the turn; if there is none, the first token added to the vocabulary.
    found = [i for kind in kinds for i in after if i in kind]
    return Frame(lead, tail, marks[-1] if marks else None, found[0] if found else None)


def _around_calls(pair: Row, tokenizer: Any, added: AddedTokens, around: Frame) -> Frame:
    """The frame of an answer that calls tools, from that of an answer in words.

    The tool's name belongs to the answer, even if a template writes it in place of the lead of words (gpt-oss).
    """
    *before, last = pair["completion"]
    mute = {k: v for k, v in last.items() if k != "tool_calls"}
    mute["content"] = last.get("content") or ""
    prompt = rendered(pair, tokenizer, pair["prompt"], True, tokenize=False)
    whole = rendered(pair, tokenizer, [*pair["prompt"], *before, last], False, tokenize=False)
    if whole == rendered(pair, tokenizer, [*pair["prompt"], *before, mute], False, tokenize=False):
        raise ValueError(
            "the last message calls a tool, and the chat template writes no calls, so there is nothing to score. Use a "
            "tokenizer whose template does, or leave such rows out."
        )
    said = whole[common_prefix_length(prompt, whole) :]
    tokens = _tokens(said, tokenizer)
    special = [i for i in tokens if i in added.special]
    end = around.end if around.end in tokens else special[-1] if special else None
    if said.startswith(around.lead):
        return replace(around, end=end)
    return Frame("", around.tail, None, end)


def _tokens(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def answer_text(
    tokens: Sequence[int], frame: Frame, ends: Collection[int], tokenizer: Any, added: AddedTokens, wanted: str = ""
) -> str:
    """The text of an answer: without its end, special tokens, and what the template puts around it.

    Args:
        tokens: The tokens of the answer.
        frame: The frame of the row.
        ends: Tokens that end an answer.
        tokenizer: The model's.
        added: The tokenizer's added tokens.
        wanted: The right answer, which may itself contain the text with which the template ends a turn.

    Returns:
        The text. If a block of thoughts was closed, only what follows it.
    """
    tokens = list(tokens)
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    tokens, lead = tokens[:stop], frame.lead
    if frame.mark is not None and frame.mark in tokens:
        tokens = tokens[len(tokens) - tokens[::-1].index(frame.mark) :]
        lead = lead.rpartition(added.texts[frame.mark])[2]
    text = tokenizer.decode([token for token in tokens if token not in added.special])
    if lead and text.startswith(lead):
        text = text[len(lead) :]
    elif lead.strip() and text.lstrip().startswith(lead.strip()):
        text = text.lstrip()[len(lead.strip()) :].lstrip()
    elif lead and not lead.strip() and frame.mark is not None:
        text = text.lstrip()
    if frame.end is None and frame.tail:
        shown = frame.tail.rstrip() or frame.tail
        text = shown.join(text.split(shown)[: wanted.count(shown) + 1])
    return text
