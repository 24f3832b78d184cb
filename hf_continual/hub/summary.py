"""The first sentences of a card, from the numbers alone."""

from __future__ import annotations

from hf_continual.hub import tables
from hf_continual.hub.facts import CardFacts, Evaluation
from hf_continual.inference.names import NAMES
from hf_continual.tasks import Task


def summary(facts: CardFacts) -> str:
    """Two sentences from the numbers: what it learned, from what, by which method; what it knows and forgot."""
    names = [t.name for t in facts.tasks]
    kind = "A LoRA adapter" if facts.kind == "adapter" else "A language model"
    if (own := facts.adapter.get("kind")) is not None:
        kind = f"{NAMES[own].title[0].upper()}{NAMES[own].title[1:]} for a frozen language model"
    start = facts.base.shown if facts.base.hub_id or facts.base.name else "a local base model"
    if facts.merge is not None:
        others = sum(ref != facts.base for ref in facts.merge.inputs)
        inputs = f"{others} model{'s' * (others != 1)}{' and the base' * (others < len(facts.merge.inputs))}"
        first = f"{kind} merged from {inputs} by {facts.merge.method}; the root of its lineage is {start}."
    elif len(names) > 1:
        first = f"{kind} that learned {len(names)} tasks one after another ({', '.join(names)}), starting from {start}"
        first += _by(facts) + "."
    else:
        # A run that gave its task no name has the default's.
        learned = f"learned {names[0]}, starting from" if names and names != [Task.name] else "was fine-tuned from"
        first = f"{kind} that {learned} {start}{_by(facts)}."
    figures = facts.evaluation.figures
    if figures["op"] is None:
        return first + "\nIt was not scored on its tasks (NOT_RUN)."
    what = "loss" if facts.evaluation.lower_is_better else "score"
    second = f"After the last task its mean {what} over {len(facts.evaluation.tasks)} tasks is **{tables.number(figures['op'])}**"
    if facts.merge is not None:
        second = f"Its mean {what} over {len(facts.evaluation.tasks)} tasks is **{tables.number(figures['op'])}**"
    if len(facts.evaluation.tasks) == 1:
        second = f"Its {what} on {facts.evaluation.tasks[0]} is **{tables.number(figures['op'])}**"
    return f"{first}\n{second}{_lost(facts.evaluation)}.{_abilities(facts.evaluation)}"


def _lost(evaluation: Evaluation) -> str:
    """How much the earlier tasks lost, on average and for the one that lost most."""
    lost = evaluation.figures["forgetting"]
    if lost is None:
        return ""
    matrix = evaluation.accuracy
    each = {task: matrix.forgotten(j) or 0.0 for j, task in enumerate(evaluation.tasks[: matrix.last])}
    worst = max(each, key=lambda task: each[task])
    if each[worst] <= 0:
        return (
            f"; on average an earlier task gained {tables.number(-lost)} on its best"
            if lost < 0
            else "; no earlier task fell below its best"
        )
    if lost > 0:
        return f"; on average an earlier task lost {tables.number(lost)} from its best"
    even = "kept its best" if lost == 0 else f"gained {tables.number(-lost)} on its best"
    return f"; on average an earlier task {even}, but {worst} lost {tables.number(each[worst])}"


def _abilities(evaluation: Evaluation) -> str:
    """General abilities that got worse: this is part of what was forgotten."""
    worse = [f"{g.name} from {tables.number(g.base)} to {tables.number(g.value)}" for g in evaluation.gauges if g.worse]
    return f" Outside its tasks it got worse: {', '.join(worse)}." if worse else ""


def _by(facts: CardFacts) -> str:
    methods = [m.name for m in facts.methods]
    return f", with {', '.join(methods)} against forgetting" if methods else ", without a method against forgetting"


def kind_title(facts: CardFacts) -> str | None:
    """What an adapter that changes inference is called; None for LoRA and full models."""
    kind = facts.adapter.get("kind")
    return None if kind is None else NAMES[kind].title.split(" ", 1)[1]
