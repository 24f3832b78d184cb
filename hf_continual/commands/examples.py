"""One example command for each subcommand, shown below its help."""

from __future__ import annotations

EXAMPLES: dict[str, str] = {
    "train": "hf-continual train --model Qwen/Qwen2.5-0.5B --train law.jsonl --methods '{replay: {rows: old.jsonl, ratio: 0.1}}'",
    "run": "hf-continual run plan.yaml --dry-run",
    "score": "hf-continual score out/law --test law.test.jsonl --metric exact_match",
    "chat": "hf-continual chat out/law --prompt 'What is a lien?'",
    "gate": "hf-continual gate out/new --against out/released",
    "diagnose": "hf-continual diagnose out/task-00-old out/task-01-new --rows old.jsonl --base Qwen/Qwen2.5-0.5B",
    "report": "hf-continual report out/plain out/replay --out report.html",
    "recommend": "hf-continual recommend plan.yaml --general general.jsonl",
    "methods": "hf-continual methods --json",
    "push": "hf-continual push out/law me/law --dry-run",
    "schema": "hf-continual schema --out plan.schema.json",
    "skill": "hf-continual skill > SKILL.md",
    "demo": "hf-continual demo --out demo-out",
}


def example(verb: str) -> str:
    """The example at the end of a subcommand's help."""
    return f"Example: {EXAMPLES[verb]}"
